"""Talking to a trained model, in a terminal or on a page of this machine."""
