import json
from pathlib import Path

import pytest
import torch
from near_lossless import tokens
from transformers import PreTrainedModel

from spectralquant import PrefixStore, SpectralQuantEngine
from spectralquant.cli.main import main
from spectralquant.compat import cache_argument


@pytest.fixture
def store(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> PrefixStore:
    """With two texts."""
    made = PrefixStore(tmp_path / "prefixes")
    for length in (500, 700):
        cache, ids = engine.cache(llama), tokens(length)
        with torch.no_grad():
            llama(ids, **cache_argument(llama, cache))
        made.save(cache, ids)
    return made


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    status = main(["store", *words, "--json"])
    return {"status": status, **json.loads(capsys.readouterr().out)}


def test_ls(store: PrefixStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "ls", str(store.directory)]) == 0
    assert "768" in capsys.readouterr().out
    (root,) = document(capsys, "ls", str(store.directory))["roots"]
    assert (root["blocks"], root["tokens"], root["tails"], root["bytes"]) == (6, 768, 2, store.stats()["bytes"])


def test_verify(store: PrefixStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert document(capsys, "verify", str(store.directory)) == {"status": 0, "directory": str(store.directory), "entries": 8, "problems": []}
    path = store.entries()[0].path
    path.write_bytes(path.read_bytes()[:-1])
    found = document(capsys, "verify", str(store.directory))
    assert found["status"] == 1 and [p["path"] for p in found["problems"] if p["broken"]] == [str(path)]
    assert main(["store", "verify", str(store.directory)]) == 1
    assert f"broken: {path}" in capsys.readouterr().out


def test_prune(store: PrefixStore, capsys: pytest.CaptureFixture[str]) -> None:
    before = store.stats()["bytes"]
    assert document(capsys, "prune", str(store.directory))["removed"] == 0, "without options what is whole stays"
    assert document(capsys, "prune", str(store.directory), "--unused-days", "1")["removed"] == 0
    pruned = document(capsys, "prune", str(store.directory), "--max-size", str(before // 2))
    assert pruned["removed"] and pruned["bytes"] <= before // 2 and pruned["bytes_before"] == before
    assert document(capsys, "prune", str(store.directory), "--unused-days", "0")["bytes"] == 0


def test_archive(store: PrefixStore, capsys: pytest.CaptureFixture[str]) -> None:
    before = store.stats()["bytes"]
    assert document(capsys, "archive", str(store.directory))["saved"] == 0, "nothing was unused for a week"
    archived = document(capsys, "archive", str(store.directory), "--unused-days", "0")
    assert archived["saved"] > 0 and archived["bytes_before"] == before > store.stats()["bytes"]
    assert not store.verify()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("ls", "nowhere"), "FOLDER nowhere: there is no such folder"),
        (("prune", ".", "--max-size", "big"), "--max-size='big': expected a positive number of bytes"),
        (("archive", ".", "--unused-days", "-1"), "--unused-days -1.0: expected 0 or more"),
        (("prune", ".", "--unused-days", "-1"), "--unused-days -1.0: expected 0 or more"),
    ],
)
def test_wrong_input(words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["store", *words]) == 2
    assert text in capsys.readouterr().err
