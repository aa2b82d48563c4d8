"""Benchmarks: readers, prompts, scorers, aggregates."""
