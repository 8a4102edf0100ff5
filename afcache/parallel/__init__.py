"""Processes that draw one image together: their groups, and the checks that keep them together."""
