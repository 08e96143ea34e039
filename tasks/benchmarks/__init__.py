"""Benchmarks of the field, on their own harness."""
