"""The stages: one module per stage of dvc.yaml, and their shared code."""
