"""Text to token files to batches: tokenizers, Megatron's indexed format and GPT datasets."""
