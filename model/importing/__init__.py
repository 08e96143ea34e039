"""Checkpoints of other formats -> Hugging Face Llama directories."""
