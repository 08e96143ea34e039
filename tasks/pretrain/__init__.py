"""Stage `pretrain`: the base model."""
