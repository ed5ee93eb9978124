"""Building a run from a config, its loop, its log, its checkpoints."""
