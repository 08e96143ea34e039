"""The stage `audit`: who and what the cleaned corpus speaks of, how toxic it is, in which languages."""
