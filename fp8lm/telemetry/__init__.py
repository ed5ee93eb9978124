"""Statistics of casts to low precision: which tensors of which layers suffer, and the guard."""
