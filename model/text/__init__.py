"""Text <-> ids, dialogues <-> ids."""
