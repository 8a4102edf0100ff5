"""Pure functions over tensors: no module state, no logging, no host library."""
