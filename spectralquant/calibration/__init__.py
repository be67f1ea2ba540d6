"""Offline part: run a model over text, gather statistics, and turn them into a Profile."""
