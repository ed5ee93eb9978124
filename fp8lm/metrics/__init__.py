"""Where the numbers of a run go: log lines, metrics.jsonl, TensorBoard, wandb."""
