"""What a GGUF file says about BOS."""

from pathlib import Path

import pytest

from spectralquant.cli.models import adds_bos, demo_model_path

gguf = pytest.importorskip("gguf")


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


def test_smollm2_adds_none() -> None:
    assert adds_bos(demo_model_path()) is False
