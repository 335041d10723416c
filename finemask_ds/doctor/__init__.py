"""Is this machine or cluster fit for a long run: facts of every rank, checks of them, one line for each finding."""
