"""Models of other programs, in and out: HuggingFace, compressed-tensors, megatron-core."""
