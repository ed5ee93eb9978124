"""Process groups, and collectives of scaled tensors."""
