"""Shared code of the training stages."""
