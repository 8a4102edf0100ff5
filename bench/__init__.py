"""Benchmarks and the training of mini-FLUX; run as `python -m bench.<name>` from a clone."""
