"""The stack in groups of blocks, each with a strategy of its own."""
