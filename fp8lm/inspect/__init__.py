"""What a run will be, told from its config alone: who holds what, and in how many bytes."""
