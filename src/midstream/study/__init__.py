"""Stages with identity, the graph that shares them, and the store that keeps them."""
