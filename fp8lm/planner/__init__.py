"""What a run will be, worked out before a process is started."""
