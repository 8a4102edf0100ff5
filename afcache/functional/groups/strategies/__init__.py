"""What a group of blocks may do instead of computing: one strategy a file, each a pure function from memory to a proposal."""
