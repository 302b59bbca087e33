"""A whole run beyond one process: its plan, and engines (Ray, Slurm) that compute its units elsewhere.

The stages know nothing of them.
"""
