"""Proximal policy optimisation of a round's version."""
