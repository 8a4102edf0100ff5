"""Policies that decide by what they see of a step, and blocks that run at every step."""
