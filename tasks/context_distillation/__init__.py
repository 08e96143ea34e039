"""Context distillation for safety: answers that pre-prompts draw, to be learnt without these."""
