"""A study as jobs of a Slurm cluster."""
