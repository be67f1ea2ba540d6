"""Text to score: from a file, from JSON lines, or from the modules of the running Python; and its windows."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralquant.errors import ConfigError
from spectralquant.untrusted import members, parse_json


def read_text(source: str) -> str:
    """The text behind `source`: a file (WikiText's word tokenisation is undone), a `.jsonl` file whose string fields are joined, or
    `stdlib:` and names of modules of the running Python, whose source is joined.

    Raises:
        ConfigError: There is no such file or module, it is no text, or the JSON can't be read.
    """
    if source.startswith("stdlib:"):
        return "\n\n".join(_module_source(name) for name in source.removeprefix("stdlib:").split(","))
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(f"text source {source!r}: there is no such file (a path, or stdlib:module,module)")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"text source {source!r}: byte {error.start} is not UTF-8; expected a text file") from error
    if path.suffix == ".jsonl":
        try:
            records = [members(parse_json(line, f"line {i}"), f"line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        except ValueError as error:
            raise ConfigError(f"text source {source!r} is not JSON lines: {error}") from error
        return "\n\n".join("\n".join(v for v in record.values() if isinstance(v, str)) for record in records)
    return detokenise(text) if " @-@ " in text or "<unk>" in text else text


def _module_source(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ConfigError(f"text source stdlib:{name}: this Python has no such module with a source file")
    return Path(spec.origin).read_text(encoding="utf-8")


def detokenise(text: str) -> str:
    """Undo the word-level tokenisation of WikiText."""
    text = text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "unknown")
    text = re.sub(r" ([.,;:!?%\)\]])", r"\1", text)
    return re.sub(r"([\(\[]) ", r"\1", text).replace(" 's", "'s").replace(" n't", "n't")


def tokenise(tokenizer: Any, text: str) -> Tensor:
    """Token ids [1, N] of a text of any length, without special tokens."""
    pieces = [text[i : i + 200_000] for i in range(0, len(text), 200_000)]
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return torch.tensor([[token for piece in ids for token in piece]])


def begin_with(lead: list[int], window: Tensor) -> Tensor:
    """`window` [1, T] with its first tokens replaced by `lead`: a window from mid-text begins as the tokenizer begins every text."""
    return torch.cat([torch.tensor([lead], dtype=window.dtype), window[:, len(lead) :]], 1)


def spread_windows(ids: Tensor, size: int, count: int, seed: int, name: str) -> list[Tensor]:
    """`count` windows [1, size] spread evenly over ids [1, N], shifted together by an offset that `seed` decides.

    Raises:
        ConfigError: The text is too short for windows that do not overlap.
    """
    free = ids.shape[1] - size
    stride = free / count
    if free < 0 or (count > 1 and stride < size):
        raise ConfigError(f"text {name!r} has {ids.shape[1]} tokens, too few for {count} windows of {size}: bring more text or ask for fewer windows")
    offset = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
    starts = [int((i + offset) * stride) for i in range(count)]
    return [ids[:, start : start + size] for start in starts]
