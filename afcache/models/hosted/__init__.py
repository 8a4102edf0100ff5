"""Families whose models run their own forward: what is described is how their pipelines call it."""
