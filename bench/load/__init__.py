"""Requests that arrive at random: what batchers make of them, by the clock of a simulation."""
