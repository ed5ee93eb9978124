"""Processes, signals, files, locks and output; imports nothing else of the package."""
