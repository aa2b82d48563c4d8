"""Runs what a study lacks: on this machine, on several, as jobs of a cluster."""
