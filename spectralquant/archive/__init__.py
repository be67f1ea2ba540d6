"""Codes of cold prefixes, for storage only: what attention reads is made from them when they are loaded."""
