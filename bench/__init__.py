"""Benchmarks, and the main job: `python -m bench.train_lm` trains a small language model."""
