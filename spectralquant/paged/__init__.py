"""The packed cache in pages: for servers that hand out memory in blocks of 128 tokens and share them between requests. Nothing in here knows a server."""
