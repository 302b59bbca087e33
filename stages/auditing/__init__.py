"""What `stages.audit` and `stages.compare` read, recompute and hold against each other."""
