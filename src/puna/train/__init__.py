"""Data to weights. One loop, with small losses and parameter choices on it."""
