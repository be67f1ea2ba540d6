"""The cache: exact sinks, packed history, recent window, and its HuggingFace form."""
