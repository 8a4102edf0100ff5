"""Benchmarks and the training of mini-FLUX and mini-Wan; run as `python -m bench.<name>` from a clone."""
