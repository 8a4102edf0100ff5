"""Trajectories without a pipeline: drawn, kept in files, exported."""
