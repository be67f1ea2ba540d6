"""Which attention runs: the kernel only where it computes the same function. The kernel itself is in test_cuda.py; here a double stands for it."""

from dataclasses import replace
from typing import Any

import pytest
import synthetic
import torch
from tiny_models import TinyTokenizer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import sliding_window_causal_mask_function

import spectralquant.attention.dispatch as dispatch
import spectralquant.cache.segment as segment_module
from spectralquant import SpectralQuantEngine
from spectralquant.attention.dispatch import CPU_ROWS, GPU_ELEMENTS, GPU_LENGTH, attend_packed, make_mask
from spectralquant.attention.reference import attend
from spectralquant.attention.tiles import attend_tiles
from spectralquant.cache.segment import Segment
from spectralquant.codec.codec import build_codec
from spectralquant.codec.packed import PackedKV
from spectralquant.compat import cache_argument
from spectralquant.config import CacheConfig, Dials
from spectralquant.presets import PRESETS


class Double:
    """Computes what the kernel computes: causal order and left padding, told by nothing but the PackedKV."""

    def __init__(self) -> None:
        self.calls = 0

    def attend(self, query: Tensor, kv: PackedKV, scale: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        self.calls += 1
        slots = torch.arange(kv.length)
        mask = (slots[None] <= slots[-query.shape[2] :, None])[None] & (slots >= kv.start[:, None])[:, None]
        return attend(query, kv, mask[:, None], scale, softcap, sinks)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    made = Double()
    monkeypatch.setattr(dispatch, "_fused_on", lambda device: made)
    return made


def packed(
    new: int = 1, padding: tuple[int, ...] = (0, 3), kernels: bool = True, groups: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, PackedKV]:
    """Queries [2, 2 groups, new, 64] and what they read: 300 tokens and theirs."""
    codec = build_codec(synthetic.profile(layers=(0,)), PRESETS["high"], Dials(), device)[0]
    keys, values = torch.randn(2, 2, 2, 300 + new, 64, dtype=dtype, device=device)
    segment = Segment(codec, CacheConfig(), keys, torch.tensor(padding, device=device))
    segment.update(keys[:, :, :300], values[:, :, :300])
    view = segment.update(keys[:, :, 300:], values[:, :, 300:])
    assert view is not None
    return torch.randn(2, 2 * groups, new, 64, dtype=dtype, device=device), replace(view, kernels=kernels)


def mask_of(tokens: Tensor | None, new: int, length: int, **options: Any) -> Tensor | None:
    first = length - new
    return make_mask(batch_size=2, q_length=new, kv_length=length, q_offset=first, attention_mask=tokens, cache_position=torch.arange(first, length), **options)


def left_padded(length: int, *padding: int) -> Tensor:
    return torch.arange(length)[None] >= torch.tensor(padding)[:, None]


@pytest.mark.parametrize("new", [1, 2, 40])
def test_kernel_takes_left_padded_batches(double: Double, new: int) -> None:
    query, kv = packed(new)
    mask = mask_of(left_padded(300 + new, 0, 3), new, 300 + new)
    got = attend_packed(query, kv, mask)
    assert double.calls == 1
    torch.testing.assert_close(got, attend(query, kv, mask), rtol=1e-5, atol=1e-6)


def test_kernel_takes_plain_causal_order(double: Double) -> None:
    query, kv = packed(2, padding=(0, 0))
    attend_packed(query, kv, None)
    attend_packed(query, kv, mask_of(None, 2, 302))
    attend_packed(query, kv, mask_of(left_padded(302, 0, 0), 2, 302))
    assert double.calls == 3


def test_reference_takes_everything_else(double: Double) -> None:
    query, kv = packed(2)
    hole = left_padded(302, 0, 3)
    hole[1, 50] = False
    masks: dict[str, Tensor | None] = {
        "no mask, so padding is seen": None,
        "a hole in the mask": mask_of(hole, 2, 302),
        "padding that the cache was not told of": mask_of(left_padded(302, 0, 7), 2, 302),
        "a mask of somebody else": torch.ones(2, 1, 2, 302, dtype=torch.bool),
        "another mask function": mask_of(left_padded(302, 0, 3), 2, 302, mask_function=sliding_window_causal_mask_function(64)),
    }
    for mask in masks.values():
        torch.testing.assert_close(attend_packed(query, kv, mask), attend(query, kv, mask))
    attend_packed(query, replace(kv, kernels=False), mask_of(left_padded(302, 0, 3), 2, 302))
    assert double.calls == 0


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of the queries of every call of `attend_tiles`."""
    calls: list[int] = []

    def counted(query: Tensor, *args: Any) -> Tensor:
        calls.append(query.shape[2])
        return attend_tiles(query, *args)

    monkeypatch.setattr(dispatch, "attend_tiles", counted)
    return calls


def test_tiles_take_many_queries_on_a_cpu(tiles: list[int]) -> None:
    for new in (CPU_ROWS // 2 - 1, CPU_ROWS // 2):  # two query heads to a KV head
        query, kv = packed(new, kernels=False)
        mask = mask_of(left_padded(300 + new, 0, 3), new, 300 + new)
        torch.testing.assert_close(attend_packed(query, kv, mask, 0.2), attend(query, kv, mask, 0.2), rtol=1e-4, atol=1e-5)
    assert tiles == [CPU_ROWS // 2]


def test_tiles_leave_other_masks_and_softcaps_to_others(tiles: list[int], double: Double) -> None:
    query, kv = packed(100, kernels=False)
    hole = left_padded(400, 0, 3)
    hole[1, 50] = False
    for mask in (None, mask_of(hole, 100, 400), torch.ones(2, 1, 100, 400, dtype=torch.bool)):
        torch.testing.assert_close(attend_packed(query, kv, mask), attend(query, kv, mask))
    mask = mask_of(left_padded(400, 0, 3), 100, 400)
    attend_packed(query, kv, mask, softcap=5.0)
    assert not double.calls
    attend_packed(query, replace(kv, kernels=True), mask, softcap=5.0)
    assert double.calls == 1 and not tiles


@pytest.mark.gpu
def test_tiles_take_many_queries_on_a_gpu(tiles: list[int]) -> None:
    """From a number of elements and of positions on, in 16 bits, where kernels may run."""
    query, _ = packed(64, (0, 0), True, 2, torch.bfloat16, "cuda")
    enough = GPU_ELEMENTS * 64 // query.numel()
    for new, groups, dtype, kernels in (
        (enough, 2, torch.bfloat16, True),
        (enough - 1, 2, torch.bfloat16, True),
        (GPU_LENGTH - 1, 2 * enough // GPU_LENGTH + 2, torch.bfloat16, True),
        (enough, 2, torch.float32, True),
        (enough, 2, torch.bfloat16, False),
    ):
        query, kv = packed(new, (0, 0), kernels, groups, dtype, "cuda")
        attend_packed(query, kv)
    assert tiles == [enough]


def test_generation_reaches_the_kernel(
    double: Double, engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A left-padded batch, and one without padding: every step after the prompt, in every layer, with the tokens of the reference."""
    ids = torch.randint(3, 90, (2, 300))
    for padding in (0, 5):
        mask = left_padded(300, 0, padding)
        out = []
        for kernels in (False, True):
            monkeypatch.setattr(segment_module, "use_kernels", lambda *_, use=kernels: use)
            before, cache = double.calls, engine.cache(llama)
            out.append(llama.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **cache_argument(llama, cache)))
            assert double.calls - before == (5 * len(cache.coded_layers) if kernels else 0)
        assert torch.equal(*out)
