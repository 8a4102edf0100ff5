"""Contenders that draw the same images, each in a process of its own."""
