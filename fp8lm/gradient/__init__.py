"""Reduction of gradients over data-parallel ranks, in low precision."""
