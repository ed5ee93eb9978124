"""What a trained model can do: perplexity, zero-shot tasks, recall over long contexts."""
