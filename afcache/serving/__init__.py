"""Many requests at once: each with a state, a tolerance and a step of its own, in one batch."""
