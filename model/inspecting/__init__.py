"""Looking into a model, for pictures."""
