"""The plan of a run (layout, bytes, batches), computed before a process starts."""
