"""How far a long work is, for the person who waits."""
