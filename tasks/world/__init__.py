"""The embedded stand-in for the world outside: a small closed world in natural English, with known truth."""
