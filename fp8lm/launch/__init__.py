"""`python -m fp8lm.launch`: check a run, show who will hold what, and start it with torchrun."""
