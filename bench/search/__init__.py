"""Searching for settings, and the curves of speed and quality that a search compares."""
