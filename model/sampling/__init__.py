"""Sampling from a network."""
