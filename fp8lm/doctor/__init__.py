"""Can training run here? `python -m fp8lm.doctor` gathers facts, judges them and prints a table.

Nothing in this package imports torch or megatron-core at its top, so that it starts where they are
missing or broken, and says so.
"""
