"""Where text comes from, and how it is cut."""

import argparse
import enum
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer

from spectralquant.errors import ConfigError
from spectralquant.evaluation.plan import DEFAULT_TEXTS
from spectralquant.evaluation.texts import detokenise, read_text, spread_windows, tokenise


def test_read_text_of_a_file_is_the_file(tmp_path: Path) -> None:
    """Text that is no WikiText is left alone, even where it looks like its tokenisation."""
    path, text = tmp_path / "a.txt", "Naïve text ( with spaces ) , 中文\n\tand tabs .\n"
    path.write_text(text, encoding="utf-8")
    assert read_text(str(path)) == text


def test_read_text_undoes_wikitext(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(" The 1 @,@ 234 @.@ 5 km ( long @-@ lost ) road 's <unk> is n't here ; gone .\n", encoding="utf-8")
    assert read_text(str(path)) == " The 1,234.5 km (long-lost) road's unknown isn't here; gone.\n"


def test_read_text_joins_the_strings_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"title": "One", "year": 1, "text": "first"}, {"text": "second\nline", "tags": ["x"]}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    assert read_text(str(path)) == "One\nfirst\n\nsecond\nline"


def test_read_text_of_modules_is_their_source() -> None:
    sources = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (argparse, enum)]
    assert read_text("stdlib:argparse,enum") == "\n\n".join(sources)


@pytest.mark.parametrize("name", sorted(DEFAULT_TEXTS))
def test_default_texts_are_there(name: str) -> None:
    assert len(read_text(DEFAULT_TEXTS[name])) > 250_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", "byte 3 is not UTF-8; expected a text file"),
        ("a.jsonl", b'{"a": 1}\n[1]', r"is not JSON lines: line 2 is \[1\], expected an object"),
        ("a.jsonl", b"3", "line 1 is 3, expected an object"),
        ("a.jsonl", b"{" * 5000, "line 1 is no JSON"),
        ("a.jsonl", b"[" * 50_000, "line 1 is nested more than 32 deep"),
    ],
)
def test_read_text_rejects_what_is_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_text(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/a.txt", "text source '/nowhere/a.txt': there is no such file"),
        (".", "text source '.': there is no such file"),
        ("stdlib:argparse,no_such_module", "text source stdlib:no_such_module: this Python has no such module with a source file"),
        ("stdlib:no_such_package.module", "text source stdlib:no_such_package.module: this Python has no such module"),
        ("stdlib:sys", "text source stdlib:sys: this Python has no such module with a source file"),
    ],
)
def test_read_text_rejects(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_text(source)


@pytest.mark.parametrize("text", ["", "Plain text, with (all) kinds: of; marks! And 'quotes'?", "a\n\nb  c"])
def test_detokenise_leaves_plain_text(text: str) -> None:
    assert detokenise(text) == text and detokenise(detokenise(text)) == detokenise(text)


def test_tokenise_long_text_keeps_every_token_and_adds_none(tokenizer: TinyTokenizer) -> None:
    """Longer than one piece; the tokenizer's start token is left out. A word that a piece's end cuts gives two tokens."""
    text = "abc defg " * 60_000
    ids = tokenise(tokenizer, text)
    assert ids.shape[0] == 1 and ids.dtype == torch.int64
    assert 120_000 <= ids.shape[1] <= 120_000 + len(text) // 200_000
    assert torch.equal(tokenise(tokenizer, text[:900]), torch.tensor([tokenizer(text[:900], add_special_tokens=False)["input_ids"]]))


@pytest.mark.parametrize(("length", "size", "count"), [(1000, 90, 10), (1001, 37, 8), (500, 500, 1), (5000, 64, 3)])
def test_spread_windows(length: int, size: int, count: int) -> None:
    """In order, without overlap, evenly apart; together with the gaps at both ends they cover the text."""
    ids = torch.arange(length)[None]
    for seed in range(5):
        windows = spread_windows(ids, size, count, seed, "t")
        starts = [int(w[0, 0]) for w in windows]
        assert len(windows) == count and all(torch.equal(w[0], torch.arange(s, s + size)) for w, s in zip(windows, starts, strict=True))
        gaps = [b - a for a, b in pairwise(starts)]
        assert not gaps or (min(gaps) >= size - 1 and max(gaps) - min(gaps) <= 1)
        assert starts[0] <= (length - size) / count and starts[-1] + size <= length
        assert starts == [int(w[0, 0]) for w in spread_windows(ids, size, count, seed, "t")]


def test_spread_windows_move_with_the_seed() -> None:
    ids: Any = torch.arange(100_000)[None]
    assert len({int(spread_windows(ids, 10, 4, seed, "t")[0][0, 0]) for seed in range(20)}) > 15


@pytest.mark.parametrize(("length", "size", "count"), [(99, 100, 1), (199, 100, 2), (0, 1, 1)])
def test_spread_windows_reject_short_text(length: int, size: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"text 'book' has {length} tokens, too few for {count} windows of {size}: bring more text"):
        spread_windows(torch.arange(length)[None], size, count, 0, "book")
