"""Studies as Python functions."""
