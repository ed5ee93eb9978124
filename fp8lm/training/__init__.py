"""Building a run from a config; the training loop, its hooks and its checkpoints."""
