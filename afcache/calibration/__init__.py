"""Measurements on a user's own model."""
