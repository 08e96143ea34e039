"""How every stage runs: its parameters, its fingerprint, its record, its locks, its start and its end."""
