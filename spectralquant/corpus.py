"""The bundled calibration corpus, and how any corpus becomes token samples.

64 texts written for this package: prose, encyclopedic articles, dialogue, code in many languages, worked maths, science, lists, tables,
JSON and configuration, a dozen human languages. Kinds matter more than amount: the same codec calibrated on one kind of
text has several times the error on another.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from spectralquant.config import require_int
from spectralquant.errors import CalibrationError, ConfigError

SAMPLE_TOKENS = 1024
"""Length of one calibration sample: several texts long. Keys are taken before the rotary embedding, so longer ones teach little more."""
DEFAULT_TOKENS = 44_000
"""Of a calibration on a CPU. All 69,000 of the bundled corpus take 10 % off the KL (docs/evaluation.md) and half as much time again."""
MOST_TOKENS = 128_000
"""Of a calibration on an accelerator."""
HELD_OUT_TOKENS = 512
"""Length of one held-out window: context plus scored tokens."""
HELD_OUT_WINDOWS = 6


@cache
def _bundled() -> tuple[str, ...]:
    folder = files("spectralquant") / "data" / "corpus"
    return tuple(f.read_text(encoding="utf-8") for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".txt"))


def get_default_calibration_texts(n_samples: int | None = None) -> list[str]:
    """The bundled texts, or `n_samples` of them spread evenly over all kinds."""
    texts = list(_bundled())
    if n_samples is None:
        return texts
    count = require_int("n_samples", n_samples, 1, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


@dataclass(frozen=True, slots=True)
class Samples:
    """Token samples [1, T] for the statistics, and windows [1, T] kept out of them for the choice among codecs."""

    statistics: list[Tensor]
    held_out: list[Tensor]

    @property
    def tokens(self) -> int:
        return sum(s.shape[1] for s in self.statistics)


def token_budget(device: torch.device) -> int:
    """Tokens that a calibration on `device` reads at most."""
    return DEFAULT_TOKENS if device.type == "cpu" else MOST_TOKENS


def make_samples(tokenizer: Any, texts: "list[str] | None", n_samples: int | None = None, max_tokens: int = DEFAULT_TOKENS, seed: int = 0) -> Samples:
    """Cut texts into samples: every text gives about the same number of tokens, in an order shuffled by `seed`. Samples and windows begin as the
    tokenizer begins every text, see `leading_tokens`.

    Held-out windows are the ends of texts of many kinds; without a text long enough, the last tokens of all are held out.

    Raises:
        ConfigError: `texts` is a string, empty, or holds something that is no string.
        CalibrationError: There are too few tokens to hold any window out.
    """
    texts = get_default_calibration_texts(n_samples) if texts is None else check_texts(texts, n_samples)
    streams = [tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"] for text in texts]
    held_out, lead = _hold_out(streams), leading_tokens(tokenizer)
    order = torch.randperm(len(streams), generator=torch.Generator().manual_seed(seed)).tolist()
    share = _level([len(s) for s in streams], max_tokens)
    used = [token for i in order for token in streams[i][:share]]
    if not held_out:
        spare = min(HELD_OUT_TOKENS, len(used) // 8)
        used, held_out = used[: len(used) - spare], [used[len(used) - spare :]]
    if len(held_out[0]) < 32:
        total = sum(len(s) for s in streams)
        raise CalibrationError(f"the calibration text has {total} tokens, which is too short: at least 256 are needed, {DEFAULT_TOKENS} are recommended")
    return Samples(_cut(used, SAMPLE_TOKENS, lead), [torch.tensor([lead + window[len(lead) :]]) for window in held_out])


def leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text, such as BOS. A model that was trained with it is another model without: Gemma's perplexity is in
    the thousands.
    """
    whole, bare = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    return whole[: whole.index(bare[0])] if bare else whole


def _hold_out(streams: list[list[int]]) -> list[list[int]]:
    """Take the last HELD_OUT_TOKENS off some texts (in place): texts at least twice as long, spread evenly over their order, so over all kinds.

    A long text gives several windows when there are few texts. Empty when no text is long enough.
    """
    places = [i for i, s in enumerate(streams) for _ in range(min(len(s) // (2 * HELD_OUT_TOKENS), HELD_OUT_WINDOWS))]
    count = min(HELD_OUT_WINDOWS, len(places))
    windows: list[list[int]] = []
    for i in (places[(2 * k + 1) * len(places) // (2 * count)] for k in range(count)):
        windows.append(streams[i][-HELD_OUT_TOKENS:])
        streams[i] = streams[i][:-HELD_OUT_TOKENS]
    return windows


def check_texts(texts: object, n_samples: int | None) -> list[str]:
    """`texts` as a list of non-empty strings, the first `n_samples` of it."""
    if isinstance(texts, (str, bytes)):
        raise ConfigError("calibration_texts is one string; expected a list of strings: pass [text]")
    items = list(texts) if isinstance(texts, (list, tuple)) else None
    if items is None:
        raise ConfigError(f"calibration_texts is a {type(texts).__name__}; expected a list of strings")
    if not items:
        raise ConfigError("calibration_texts is empty; pass None for the bundled corpus")
    wrong = next((i for i, t in enumerate(items) if not isinstance(t, str) or not t.strip()), None)
    if wrong is not None:
        raise ConfigError(f"calibration_texts[{wrong}] is {items[wrong]!r:.60}; expected a string with text in it")
    if n_samples is not None:
        items = items[: require_int("n_samples", n_samples, 1, len(items))]
    return items


def _level(lengths: list[int], budget: int) -> int:
    """Largest share s with sum(min(length, s)) <= budget (at least 1)."""
    low, high = 1, max(*lengths, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(n, middle) for n in lengths) <= budget else (low, middle - 1)
    return low


def _cut(tokens: list[int], size: int, lead: list[int]) -> list[Tensor]:
    share = size - len(lead)
    pieces = [lead + tokens[i : i + share] for i in range(0, len(tokens), share)]
    return [torch.tensor([p]) for p in pieces if len(p) >= 16]
