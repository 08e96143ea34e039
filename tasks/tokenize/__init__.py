"""Stage `tokenize`: the mixture of sources as one stream of tokens."""
