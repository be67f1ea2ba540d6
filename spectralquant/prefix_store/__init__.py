"""Compressed prefixes on disk, found by their tokens and shared between processes."""
