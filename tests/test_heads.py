"""The original package's per-head classes."""

from pathlib import Path

import pytest
import torch
from tiny_models import TinyTokenizer
from transformers import PreTrainedModel

from spectralquant import EigenspectralCalibrator, HeadEngine, get_default_calibration_texts
from spectralquant.errors import CalibrationError, ConfigError, ShapeError


@pytest.fixture(scope="module")
def calibrator(llama: PreTrainedModel, tokenizer: TinyTokenizer) -> EigenspectralCalibrator:
    made = EigenspectralCalibrator(max_tokens_per_layer=4096)
    assert made.calibrate(llama, tokenizer, get_default_calibration_texts(12))["n_heads"] == 12
    return made


def test_get_is_an_orthonormal_descending_spectrum(calibrator: EigenspectralCalibrator) -> None:
    for head in calibrator.iter_heads():
        torch.testing.assert_close(head.eigenvectors.T @ head.eigenvectors, torch.eye(head.head_dim), atol=1e-4, rtol=0)
        assert (head.eigenvalues.diff() <= 0).all() and 1 <= head.var_90 <= head.var_95 == head.d_eff <= head.head_dim
        assert head.spectral_gap >= 1 and head.sigma_high >= head.sigma_low


def test_save_load(calibrator: EigenspectralCalibrator, tmp_path: Path) -> None:
    other = EigenspectralCalibrator()
    with pytest.raises(CalibrationError, match="no calibration yet"):
        other.summary()
    other.load(calibrator.save(tmp_path / "spectra"))
    assert other.summary() == calibrator.summary()


@pytest.mark.parametrize("length", [1, 128, 200])
def test_head_engine(calibrator: EigenspectralCalibrator, length: int) -> None:
    """Attention over packed keys and values equals attention over what they decode to, and the bytes are those promised."""
    head = HeadEngine(calibrator, 1, 0).to("cpu")
    data = calibrator.get(1, 0, "key")
    keys, values = (torch.randn(length, data.head_dim) @ (data.eigenvectors * data.eigenvalues.sqrt()).T for _ in range(2))
    packed_keys, packed_values = head.compress_keys(keys), head.compress_values(values)
    units = -(-length // 128)
    assert packed_keys.nbytes + packed_values.nbytes == units * 128 * head.bytes_per_token()
    query = torch.randn(3, data.head_dim)
    decoded = head.decompress(packed_keys, "key"), head.decompress(packed_values, "value")
    want = (query @ decoded[0].T * data.head_dim**-0.5).softmax(-1) @ decoded[1]
    torch.testing.assert_close(head.attention(query, packed_keys, packed_values), want)


def test_rejects(calibrator: EigenspectralCalibrator) -> None:
    with pytest.raises(ConfigError, match="expected a coded layer"):
        calibrator.get(0, 5, "key")
    with pytest.raises(ShapeError, match="expected"):
        HeadEngine(calibrator, 0, 0).compress_keys(torch.randn(4, 7))
