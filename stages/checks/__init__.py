"""What `stages.audit` recomputes and `stages.compare` measures."""
