"""vLLM with a packed KV cache: an attention backend of its own, found by its entry point, without a change to vLLM. docs/serving.md"""
