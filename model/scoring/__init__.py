"""Scoring answers: the reward model, how it learns from pairs, and many answers to one prompt at once."""
