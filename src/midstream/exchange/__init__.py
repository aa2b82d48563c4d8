"""Models of others in, and models of ours out."""
