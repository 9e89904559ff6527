"""Evidence for a choice of first stage, model, depth and threshold."""
