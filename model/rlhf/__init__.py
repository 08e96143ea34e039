"""Proximal policy optimisation: rewards of tokens, advantages, losses, the value model."""
