"""Models of random weights."""
