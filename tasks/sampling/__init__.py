"""Shared code of the stages that draw answers and choose the best of them."""
