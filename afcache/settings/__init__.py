"""What can be set, checked when it is made; named settings."""
