"""A token's keys and values into the window by the CUDA kernel of kernels/append.cu: one launch for what PyTorch does in four."""

from torch import Tensor

from spectralquant.codec.layout import UNIT
from spectralquant.kernels.launch import Launch


def append_token(keys: Tensor, values: Tensor, window_keys: Tensor, window_values: Tensor, lengths: Tensor) -> None:
    """Write keys and values [B, H, 1, D] to windows [B, H, capacity, D] of the same 16-bit dtype, behind the tokens that `lengths` [B, 2] counts, and count
    them.

    Raises:
        BackendError: The kernel can't be built.
    """
    plan_append(keys, values, window_keys, window_values, lengths).run(lengths.device)


def plan_append(keys: Tensor, values: Tensor, window_keys: Tensor, window_values: Tensor, lengths: Tensor) -> Launch:
    """Everything of `append_token` but the launch, on any device."""
    batch, heads, capacity, dim = window_keys.shape
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    arguments = (keys, values, window_keys, window_values, lengths, heads, capacity, *keys.stride()[:2], *values.stride()[:2])
    return Launch("append.cu", "append_token", {"D": dim}, arguments, batch, UNIT, 0)
