"""What runs as a process of its own, and what opens the stages of a store."""
