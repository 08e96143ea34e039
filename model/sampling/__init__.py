"""What samples from a network."""
