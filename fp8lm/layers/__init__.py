"""Layers whose GEMMs and gradients are in low precision."""
