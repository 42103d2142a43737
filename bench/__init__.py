"""Benchmarks, and the main job: `python -m bench.lm.train_lm` trains a small language model."""
