"""FP8 pretraining of GPT models: weights, gradients, optimizer states and GEMMs in eight bits."""

__version__ = "0.1.0"
