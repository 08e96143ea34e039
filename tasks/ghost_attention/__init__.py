"""Ghost Attention: dialogues whose first message holds an instruction that their answers keep to."""
