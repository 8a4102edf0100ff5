"""FLUX.1, whose blocks are written again over the host's own layers."""
