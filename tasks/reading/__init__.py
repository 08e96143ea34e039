"""What stages read and hand to each other: files from outside, dialogues, prompts, pairs, rounds."""
