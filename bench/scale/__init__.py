"""FLUX.1-dev's real size, without its weights."""
