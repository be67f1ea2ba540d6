"""Where a verb's words and figures go."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from spectralquant.files import plain
from spectralquant.terminal import make_table

PIPED_WIDTH = 200
"""Characters of a line that goes to a file or a pipe: there is no window to fit."""


class Output:
    """Words for a person and one document for a program: with --json the document is all there is on stdout."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        stream = sys.stderr if as_json else sys.stdout
        self.console: Console = Console(file=stream, highlight=False, markup=False, emoji=False, width=None if stream.isatty() else PIPED_WIDTH)

    def say(self, text: str = "", style: str | None = None) -> None:
        """Lines of text; never taken for markup."""
        self.console.print(text, style=style, soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", words: Sequence[str] = ()) -> None:
        """As `terminal.make_table`."""
        self.console.print(make_table(title, header, rows, caption, words))

    def document(self, content: Any) -> None:
        """The figures, when --json asks for them."""
        if self.as_json:
            print(json.dumps(plain(content), indent=2), flush=True)


def told_cache(stats: Mapping[str, Any]) -> str:
    """Size of a cache in words, from {seq_len, compressed_bytes, fp16_bytes, ratio}."""
    held, dense = f"{stats['compressed_bytes'] / 1e6:.2f} MB", f"{stats['fp16_bytes'] / 1e6:.2f} MB"
    if stats["ratio"] < 1:
        return f"cache of {stats['seq_len']:,} tokens: {held}, the window of recent tokens, made at once (FP16 {dense}); blocks are packed once it is full"
    return f"cache of {stats['seq_len']:,} tokens: {held}, FP16 {dense}, {stats['ratio']:.2f}x"
