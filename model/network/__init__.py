"""The network: its layers, its packed batches, its weights on ranks and on disk."""
