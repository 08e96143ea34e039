"""The stages: one module per stage of dvc.yaml, and what they share."""
