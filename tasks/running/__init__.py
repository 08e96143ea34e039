"""How every stage runs: its values, its fingerprint, its record, who else runs here, its start and its end."""
