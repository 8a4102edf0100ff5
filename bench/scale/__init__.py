"""What steps cost: alone, part by part, and at FLUX.1-dev's real size without its weights."""
