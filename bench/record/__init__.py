"""Results, written and read."""
