"""Attention on the packed cache: the reference that reads codes tile by tile, and its registration with transformers."""
