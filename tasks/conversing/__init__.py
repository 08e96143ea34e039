"""Shared code of the stages that let a model answer turn by turn."""
