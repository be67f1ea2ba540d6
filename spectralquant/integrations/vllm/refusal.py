"""What a vLLM that this release was not made for imports in the place of a backend: the error that says which releases it takes."""

from spectralquant.integrations.vllm.plugin import require_vllm

require_vllm()
