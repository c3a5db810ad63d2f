"""Log-probs and the trajectory-balance loss in one pass over the head."""
