"""Benchmarks and comparisons, with confidence intervals, of models and of guards."""
