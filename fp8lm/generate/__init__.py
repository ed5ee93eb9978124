"""Text from a trained model: key-value cache, sampling, chat, under any layout."""
