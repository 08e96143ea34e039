"""The embedded stand-in for the outside world: a small closed world in natural English, with known truth."""
