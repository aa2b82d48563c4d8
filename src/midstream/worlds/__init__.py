"""Worlds that are made here: the generated one, and small real data sets laid out."""
