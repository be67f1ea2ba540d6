"""Where a model comes from, and what a GGUF file says about BOS."""

import shutil
from pathlib import Path

import pytest
import torch

from spectralquant.cli.models import adds_bos, demo_model_path, find_source, load_model, load_shape
from spectralquant.errors import ConfigError

gguf = pytest.importorskip("gguf")


ENTRY = b"tokenizer.ggml.add_bos_token"


@pytest.mark.parametrize("says", [True, False, None])
def test_adds_bos_is_what_the_file_says(tmp_path: Path, says: bool | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("general.description", "tokenizer.ggml.add_bos_token is mentioned here")
    writer.add_token_list(["a", "b"])
    if says is not None:
        writer.add_add_bos_token(says)
    writer.add_bos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert adds_bos(tmp_path / "m.gguf") is bool(says)


@pytest.mark.parametrize("content", [b"", b"GGUF", len(ENTRY).to_bytes(8, "little") + ENTRY + (7).to_bytes(4, "little")], ids=["empty", "short", "cut off"])
def test_adds_bos_of_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    assert adds_bos(tmp_path / "m.gguf") is False


def test_smollm2_adds_none() -> None:
    assert adds_bos(demo_model_path()) is False


def test_find_source(model_folder: str, tmp_path: Path) -> None:
    assert find_source("smollm2") == find_source(None) and find_source(None).options == {"gguf_file": demo_model_path().name}
    assert find_source(model_folder).label == "tiny-llama" and find_source("org/name").label == "org/name"


def test_load_model_and_its_shape_agree(model_folder: str) -> None:
    model, tokenizer, label = load_model(model_folder, "bfloat16")
    shape, again = load_shape(model_folder)
    assert label == again == "tiny-llama" and model.dtype == torch.bfloat16 and tokenizer("ab")["input_ids"]
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in shape.named_parameters()}
    assert all(p.device.type == "meta" for p in shape.parameters())


def test_damaged_model_is_told(model_folder: str, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_model(str(tmp_path / "model"))
