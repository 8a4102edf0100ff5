"""A step that several processes take together."""
