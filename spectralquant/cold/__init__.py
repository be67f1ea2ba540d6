"""Prefixes put away: a prompt as an archive in one file, and what that is made with."""
