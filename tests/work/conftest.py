"""A Slurm for the works that submit jobs."""

from clusters import slurm as slurm
