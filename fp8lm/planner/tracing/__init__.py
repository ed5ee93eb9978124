"""What a training step costs, from the operations that it really runs, without a GPU."""
