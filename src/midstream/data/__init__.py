"""Public formats in, token-exact rows out."""
