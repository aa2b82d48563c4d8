"""The official files of the visual benchmarks, as downloaded -> examples (docs/evaluation.md)."""
