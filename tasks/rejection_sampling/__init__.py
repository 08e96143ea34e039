"""Stage `rejection_sampling`: several answers to each prompt of a round, and the best of them."""
