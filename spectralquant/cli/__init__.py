"""Command line: parses and calls, no logic of its own beyond what it shows."""
