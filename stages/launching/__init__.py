"""Engines that run a stage's units elsewhere: Ray's actors, Slurm's jobs. The stages know of neither."""
