"""Scoring answers: the reward model, and how it learns from pairs."""
