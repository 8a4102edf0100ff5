"""One file per architecture: how to embed, run the blocks, and apply the head."""
