"""Stage `compare`: versions with the baseline, with the version before and with their controls."""
