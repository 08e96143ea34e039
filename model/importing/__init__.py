"""Convert checkpoints of other formats to Hugging Face Llama directories."""
