"""Who judges, and how far a judgement can be trusted: labels, agreement, scores, intervals."""
