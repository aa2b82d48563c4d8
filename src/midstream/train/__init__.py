"""One loop for every training stage."""
