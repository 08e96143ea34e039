"""Stage `audit`: whom and what the cleaned corpus mentions, how toxic it is, in which languages."""
