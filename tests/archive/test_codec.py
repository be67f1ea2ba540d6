"""Keys and values at low rate: what comes back is near, costs what it should, and is the same everywhere; damage is an error."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
import torch
from damaged_files import rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralquant.archive.codec import FINE, SINKS, decode_dense, encode_dense
from spectralquant.archive.predictor import OCTAVE, ArchiveModel, Moments, fit_archive, load_archive
from spectralquant.errors import CacheFileError, CalibrationError, ConfigError, ShapeError
from spectralquant.profile import Profile
from spectralquant.rope import Rotary

HEADS, DIM, LAYERS = 2, 32, (0, 2, 3)
Made = dict[int, tuple[Tensor, Tensor]]


def profile() -> Profile:
    made = synthetic.profile(HEADS, DIM, LAYERS, rotary=Rotary(synthetic.inv_freq(DIM // 2)))
    return replace(made, layers={i: replace(layer, value_norm=torch.full((HEADS,), float(DIM))) for i, layer in made.layers.items()})


def layers(count: int, seed: int, share: float = 0.3) -> Made:
    """Keys and values that follow from one state per token, which changes by `share` from layer to layer, and matrices that are always the same."""
    make, weights = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    state = torch.randn((count, 48), generator=make)
    rotary, out = Rotary(synthetic.inv_freq(DIM // 2)), Made()
    for i in LAYERS:
        state = (1 - share**2) ** 0.5 * state + share * torch.randn((count, 48), generator=make)
        keys, values = (torch.einsum("ts,hsd->htd", state, torch.randn((HEADS, 48, DIM), generator=weights)) / 7 for _ in range(2))
        out[i] = rotary.rotate(keys, torch.arange(count)), values
    return out


def fitted(depth: int = 2, samples: int = 6) -> ArchiveModel:
    moments = Moments(profile(), depth)
    for seed in range(samples):
        moments.add(layers(600, seed))
    return fit_archive(profile(), moments)


MODEL = fitted()


def decoded(model: ArchiveModel, payload: Tensor, tokens: int) -> Made:
    return {i: (keys, values) for i, keys, values in decode_dense(model, payload, tokens)}


def residual_errors(model: ArchiveModel, given_: Made, found: Made) -> Iterator[tuple[Tensor, float]]:
    """|y - y^| in units of the step at rate 0, [T, N], of every side."""
    for i, layer in model.layers.items():
        pairs = ((layer.turned_back(given_[i][0]), layer.turned_back(found[i][0])), (given_[i][1], found[i][1]))
        for side, (x, y) in zip(layer.sides, pairs, strict=True):
            yield ((side.enter(x) - side.enter(y)) @ side.basis).abs() / 2 ** (side.step / OCTAVE), side.step


@pytest.mark.parametrize("rate", [-12, 0, 5])
def test_errors_are_half_a_step_and_a_thirtysecond_of_it_for_sinks(rate: int) -> None:
    given_ = layers(300, 50)
    given_[2][1][:, 200] = 0  # a secondary sink
    found = decoded(MODEL, encode_dense(MODEL, given_, rate), 300)
    for place, (error, _) in enumerate(residual_errors(MODEL, given_, found)):
        limit = (0.5 + 0.04 * 40) * 2 ** (rate / OCTAVE)  # rounding, and what large symbols lie nearer to zero; bases of 16 bits are not quite orthogonal
        assert error.mean() < 0.3 * 2 ** (rate / OCTAVE) and error.max() < limit
        fine = error[:SINKS] if place // 2 != 1 else torch.cat([error[:SINKS], error[200:201]])
        assert fine.mean() < 0.3 * 2 ** ((rate - FINE) / OCTAVE) + 2e-3


def test_layers_are_predicted_from_those_before() -> None:
    """With a state that hardly changes, later layers cost a fraction of what they cost alone."""
    given_, alone = layers(600, 60, share=0.05), layers(600, 60, share=0.999)
    moments = Moments(profile())
    for seed in range(6):
        moments.add(layers(600, seed, share=0.05))
    assert len(encode_dense(fit_archive(profile(), moments), given_)) < 0.7 * len(encode_dense(MODEL, alone))


def test_the_same_bytes_whatever_the_number_of_threads() -> None:
    given_, before = layers(257, 51), torch.get_num_threads()
    try:
        payloads = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            payloads.append(encode_dense(MODEL, given_))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, payloads[0]) for p in payloads)


@pytest.mark.parametrize("tokens", [1, 3, 5, 64])
def test_short_sequences(tokens: int) -> None:
    given_ = layers(tokens, 52)
    found = decoded(MODEL, encode_dense(MODEL, given_), tokens)
    assert all(a.shape == b.shape for i in LAYERS for a, b in zip(found[i], given_[i], strict=True))


def test_parts_of_a_sequence_are_that_sequence() -> None:
    """Tokens don't depend on each other; only positions and sinks tell where a part begins."""
    given_ = layers(200, 56)
    whole = decoded(MODEL, encode_dense(MODEL, given_), 200)
    for first, last in ((0, 120), (120, 200)):
        part = {i: (k[:, first:last], v[:, first:last]) for i, (k, v) in given_.items()}
        found = decode_dense(MODEL, encode_dense(MODEL, part, first=first), last - first, first)
        for i, keys, values in found:
            torch.testing.assert_close(keys, whole[i][0][:, first:last], atol=1e-4, rtol=0)
            torch.testing.assert_close(values, whole[i][1][:, first:last], atol=1e-4, rtol=0)


def test_values_of_a_million_come_back_as_far_as_symbols_reach() -> None:
    given_ = layers(64, 53)
    given_[0][1][:, 30] *= 1e6
    found = decoded(MODEL, encode_dense(MODEL, given_), 64)
    assert all(torch.isfinite(x).all() for pair in found.values() for x in pair)


@pytest.mark.parametrize("rate", [-64, -40, -4])
def test_sinks_that_a_fine_step_does_not_reach_have_the_usual_one(rate: int) -> None:
    """At the finest rates 32,767 fine steps are less than what any token takes."""
    given_ = layers(64, 57)
    for i in LAYERS:
        given_[i][1][:, 1] *= 10
    found = decoded(MODEL, encode_dense(MODEL, given_, rate), 64)
    for error, _ in residual_errors(MODEL, given_, found):
        assert error.mean() < 0.3 * 2 ** (rate / OCTAVE) + 2e-3 and error[0].max() < 0.05 + 0.6 * 2 ** (rate / OCTAVE)
        assert error[1].max() < 0.1 + 2 * 2 ** (rate / OCTAVE), "ten times the usual size; bases of 16 bits are not quite orthogonal"


def test_what_can_not_be_coded_is_refused() -> None:
    given_ = layers(32, 54)
    with pytest.raises(ShapeError, match="layer 3 are missing"):
        encode_dense(MODEL, {i: given_[i] for i in (0, 2)})
    with pytest.raises(ShapeError, match=r"expected \[2, T, 32\]"):
        encode_dense(MODEL, {**given_, 2: (given_[2][0][:1], given_[2][1])})
    with pytest.raises(ShapeError, match=r"\[31, 32\] tokens"):
        encode_dense(MODEL, {**given_, 2: (given_[2][0][:, :31], given_[2][1])})
    with pytest.raises(ConfigError, match="rate=65"):
        encode_dense(MODEL, given_, 65)
    given_[2][0][0, 5, 5] = float("nan")
    with pytest.raises(ConfigError, match="layer 2 holds keys or values that are not finite"):
        encode_dense(MODEL, given_)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_payload_is_an_error_or_other_numbers(data: st.DataObject) -> None:
    payload = PAYLOAD.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1) | st.integers(0, 60))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)) | st.just(len(payload)))]
    try:
        found = decoded(MODEL, payload, 40)
    except CacheFileError:
        return
    assert all(x.shape == (HEADS, 40, DIM) for pair in found.values() for x in pair)


PAYLOAD = encode_dense(MODEL, layers(40, 55))


@pytest.mark.parametrize("tokens", [0, 39, 41, 10**7])
def test_another_number_of_tokens_is_refused(tokens: int) -> None:
    with pytest.raises(CacheFileError, match=f"expected {tokens}"):
        decode_dense(MODEL, PAYLOAD, tokens)


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(CacheFileError, match="3 bytes are left"):
        decode_dense(MODEL, torch.cat([PAYLOAD, PAYLOAD[:3]]), 40)


def test_the_file_of_a_model(tmp_path: Path) -> None:
    path = MODEL.save(tmp_path / "a")
    again = load_archive(path, profile())
    assert again.nbytes == MODEL.nbytes and again.depth == MODEL.depth
    assert again.digest == MODEL.digest == MODEL.to("cpu").digest != fitted(depth=1).digest
    assert torch.equal(encode_dense(again, layers(40, 55)), PAYLOAD)
    other = replace(profile(), model={**profile().model, "weights": "other"})
    with pytest.raises(CacheFileError, match="another model"):
        load_archive(path, other)
    wide = synthetic.profile(HEADS, 64, LAYERS, rotary=Rotary(synthetic.inv_freq(16)))
    with pytest.raises(CacheFileError, match="has shape"):
        load_archive(path, wide)
    with pytest.raises(CacheFileError, match="incomplete"):
        load_archive(path, replace(profile(), layers={**profile().layers, 7: profile().layers[2]}))


@pytest.mark.parametrize(
    ("entry", "value"),
    [("steps", f'{{"{LAYERS[0]}": {steps}}}') for steps in ("[1e999, 1]", "[1, 9999]", "[1]", '["1", 1]', "[NaN, 1]", "1", "null")]
    + [("steps", "[]"), ("steps", "1"), ("model", "[]"), ("depth", "0"), ("depth", "inf")],
    ids=str,
)
def test_forged_headers_of_models_are_refused(tmp_path: Path, entry: str, value: str) -> None:
    path = MODEL.save(tmp_path / "a")
    rewrite(path, lambda tensors, header: header.update({entry: value}))
    with pytest.raises(CacheFileError, match="fit it again"):
        load_archive(path, profile())


def test_moments_refuse_what_they_can_not_take() -> None:
    with pytest.raises(CalibrationError, match="depth=0"):
        Moments(profile(), 0)
    with pytest.raises(CalibrationError, match="no statistics"):
        fit_archive(profile(), Moments(profile()))
    with pytest.raises(ShapeError, match=r"expected \[2, T, 32\]"):
        Moments(profile()).add({i: (k[:1], v) for i, (k, v) in layers(20, 0).items()})
