"""What a training step costs, from the operations that it really runs: see tools/trace_step.py."""
