"""Random rotation and Lloyd-Max codes against a loop over levels, and the error that theory promises."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from spectralquant.codebook import lloyd_max_codebook
from spectralquant.evaluation.methods import Subject, find_method
from spectralquant.evaluation.methods.rotation import random_rotation, round_rotated

CPU = torch.device("cpu")


def test_rotation_is_orthogonal_and_depends_on_the_seed_alone() -> None:
    one, two = random_rotation(32, 0, CPU), random_rotation(32, 1, CPU)
    torch.testing.assert_close(one @ one.T, torch.eye(32), rtol=0, atol=1e-5)
    random_rotation.cache_clear()
    assert torch.equal(random_rotation(32, 0, CPU), one) and (one - two).abs().max() > 0.1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_is_the_nearest_level_in_the_turned_frame(bits: int) -> None:
    x, turn, book = torch.randn(2, 2, 3, 8) * 5, random_rotation(8, 3, CPU), lloyd_max_codebook(bits)
    got = round_rotated(x, turn, book)
    matrix, levels = turn.double().numpy(), book.levels.double().numpy()
    for vector, decoded in zip(x.reshape(-1, 8).double().numpy(), got.reshape(-1, 8), strict=True):
        norm = float(np.float16(np.sqrt((vector**2).sum())))
        turned = [sum(vector[i] * matrix[i, j] for i in range(8)) / norm * 8**0.5 for j in range(8)]
        coded = [levels[np.argmin(np.abs(levels - t))] for t in turned]
        want = [sum(coded[j] * matrix[i, j] for j in range(8)) * norm / 8**0.5 for i in range(8)]
        np.testing.assert_allclose(decoded.numpy(), want, rtol=1e-4, atol=1e-5)


def test_error_is_the_distortion_of_the_quantizer_whatever_the_data() -> None:
    """Cubes of Gaussians: a few coordinates carry each vector, which a codebook without the rotation could not serve."""
    x = torch.randn(1, 2, 400, 64) ** 3
    errors = [float((round_rotated(x, random_rotation(64, 0, CPU), lloyd_max_codebook(b)) - x).square().sum() / x.square().sum()) for b in (2, 3, 4)]
    assert errors == pytest.approx([lloyd_max_codebook(b).distortion for b in (2, 3, 4)], rel=0.08)
    still = float((round_rotated(x, torch.eye(64), lloyd_max_codebook(2)) - x).square().sum() / x.square().sum())
    assert still > 2 * errors[0]


def test_codes_do_not_depend_on_the_size_of_a_vector() -> None:
    x, turn, book = torch.randn(1, 1, 4, 16), random_rotation(16, 0, CPU), lloyd_max_codebook(3)
    torch.testing.assert_close(round_rotated(x * 64, turn, book), 64 * round_rotated(x, turn, book), rtol=1e-5, atol=1e-5)
    assert (round_rotated(torch.zeros(1, 1, 1, 16), turn, book) == 0).all()
    assert round_rotated(torch.full((1, 1, 1, 16), 1e6), turn, book).isfinite().all()


def test_every_layer_and_side_has_a_rotation_of_its_own(tmp_path: Path) -> None:
    cache = find_method("rotation2").prepare(Subject(tiny_model(), None, tmp_path)).cache()
    x = torch.randn(1, 2, 4, 32)
    for layer in range(3):
        cache.update(x, x, layer)
    decoded = [t for layer in cache.layers for t in (layer.keys, layer.values)]  # pyright: ignore
    assert not any(torch.allclose(a, b) for a, b in combinations(decoded, 2))
    torch.testing.assert_close(decoded[3], round_rotated(x, random_rotation(32, 3, CPU), lloyd_max_codebook(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    assert round_rotated(torch.randn(1, 1, 2, 16, dtype=dtype), random_rotation(16, 0, CPU), lloyd_max_codebook(2)).dtype == dtype
