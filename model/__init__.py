"""Llama 2 in PyTorch: the model, its tokenizer, training engine, sampling and checkpoints."""
