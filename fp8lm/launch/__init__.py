"""`python -m fp8lm.launch`: check a run, show its layout, and start it with torchrun."""
