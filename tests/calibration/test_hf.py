"""Reading a model's rotation."""

from typing import Any

import pytest
import synthetic
import torch
from tiny_models import tiny_model
from torch import Tensor

from spectralquant.calibration.hf import collect, fingerprint, read_rotary

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FAR = 131_072
"""Positions of a long context."""


def read(frequencies: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[R / 2] frequencies as calibration reads them from a sample of `length` tokens, whose cos and sin the model has in `dtype`."""
    angle = (torch.arange(length).double()[:, None] * frequencies).repeat(1, 2)[None]
    rotary = read_rotary(tiny_model("llama").model.layers[0].self_attn, angle.cos().to(dtype), angle.sin().to(dtype), 2 * len(frequencies))
    assert rotary is not None and not rotary.interleaved
    return rotary.inv_freq


@pytest.mark.parametrize(("dtype", "phase"), [(torch.float32, 0.001), (torch.float16, 0.01), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
def test_read_rotary_is_precise_in_any_dtype(dtype: torch.dtype, phase: float, base: float) -> None:
    """From one sample, angles at the far end of a long context are right to `phase` radians, though bfloat16 rounds those of position 1 by 0.004."""
    want = synthetic.inv_freq(32, base)
    assert ((read(want, 1024, dtype) - want) * FAR).abs().max() < phase


@pytest.mark.parametrize("length", [2, 3, 16, 17, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_read_rotary_improves_with_length(dtype: torch.dtype, length: int) -> None:
    """Whatever the length, the phase at its end is right to the rounding of one angle."""
    want = synthetic.inv_freq(32)
    assert ((read(want, length, dtype) - want) * (length - 1)).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_rotary_of_any_frequencies(dtype: torch.dtype) -> None:
    """No rule is assumed: up to nearly half a turn per position, backwards too."""
    want = torch.cat([torch.tensor([3.1, -3.1, 0.0], dtype=torch.float64), torch.randn(29, dtype=torch.float64).clamp(-3, 3)])
    assert ((read(want, 1024, dtype) - want) * 1024).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_collect_finds_the_rotation_of_every_layer(family: str, dtype: torch.dtype) -> None:
    """Samples as long as calibration's: without it K would be coded in the plain frame, at a multiple of the error."""
    statistics = collect(tiny_model(family, dtype), [torch.randint(3, 199, (1, 1024))], [0, 1, 2])
    assert statistics.rotary.keys() == {0, 1, 2}
    assert len({tuple(r.inv_freq.tolist()) for r in statistics.rotary.values()}) == 1


def test_collect_rounds_no_product_but_projections() -> None:
    """On processors that follow the setting, a rounded product of positions and frequencies gave a rotation that nothing could read."""
    model, seen = tiny_model("llama"), {}

    def look(name: str) -> None:
        seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())

    hooks = [module.register_forward_hook(lambda *_, name=name: look(name)) for name, module in model.named_modules() if name.endswith(("rotary_emb", "norm"))]
    inside = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: look("between projections"))
    during = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: look("before a projection"))
    collect(model, [torch.randint(3, 100, (1, 64))], [0, 1])
    for hook in [*hooks, inside, during]:
        hook.remove()
    assert seen and all(settings == {"highest"} for settings in seen.values())
    assert torch.get_float32_matmul_precision() == "highest"


def test_collect_rounds_projections() -> None:
    model, seen = tiny_model("llama"), []
    original = torch.nn.functional.linear

    def linear(*args: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        collect(model, [torch.randint(3, 100, (1, 64))], [0, 1])
    assert seen and set(seen) == {"medium"}


def test_collect_warns_of_a_rotation_that_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectralquant.calibration.hf.read_rotary", lambda *_: None)
    with pytest.warns(UserWarning, match=r"rotary embedding of layers \[0, 1\].* could not be reproduced"):
        collect(tiny_model("llama"), [torch.randint(3, 100, (1, 64))], [0, 1])


class Coded(torch.Tensor):
    """As packages of quantized weights make them: it stands for values, and nothing can be done with it but products and `dequantize`."""

    values: torch.Tensor

    def dequantize(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.values

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("flatten", "view"):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_the_fingerprint_reads_weights_that_stand_for_codes() -> None:
    """It is that of the values."""
    model = tiny_model("llama")
    want, layer = fingerprint(model), model.model.layers[0].mlp.up_proj
    coded = layer.weight.detach().as_subclass(Coded)
    coded.values = layer.weight.detach()
    layer.weight = torch.nn.Parameter(coded, requires_grad=False)
    assert isinstance(layer.weight, Coded)
    layer.weight.values = coded.values
    assert fingerprint(model) == want
