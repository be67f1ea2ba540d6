"""Samples from texts."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from spectralquant.corpus import HELD_OUT_TOKENS, HELD_OUT_WINDOWS, SAMPLE_TOKENS, check_texts, get_default_calibration_texts, make_samples
from spectralquant.errors import CalibrationError, ConfigError


class NumberTokenizer:
    """Whitespace tokenizer of numbers, so that every token tells where it came from."""

    lead: tuple[int, ...] = ()

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens or text == "a", "special tokens would repeat in every text"
        return {"input_ids": [*self.lead] * add_special_tokens + [int(word) if word.isdigit() else 7 for word in text.split()]}


TOKENIZER = NumberTokenizer()


def text(number: int, length: int) -> str:
    """`length` tokens, all different and different from other texts'."""
    return " ".join(str(number * 1_000_000 + i) for i in range(length))


def flat(samples: list[torch.Tensor]) -> list[int]:
    return [token for s in samples for token in s[0].tolist()]


@pytest.mark.parametrize(("lengths", "budget"), [([5000] * 4, 8000), ([300, 9000, 9000], 6000), ([400] * 3, 32_768), ([256], 32_768), ([10_000], 5000)])
def test_make_samples_holds_out_what_statistics_never_see(lengths: list[int], budget: int) -> None:
    made = make_samples(TOKENIZER, [text(i, n) for i, n in enumerate(lengths)], max_tokens=budget)
    used, held = flat(made.statistics), flat(made.held_out)
    assert not set(used) & set(held) and len(set(used)) == len(used) and len(set(held)) == len(held)
    assert 0 < made.tokens == len(used) <= budget
    assert 1 <= len(made.held_out) <= HELD_OUT_WINDOWS and len(held) >= 32
    assert all(s.shape[0] == 1 and s.shape[1] <= SAMPLE_TOKENS for s in made.statistics)
    assert all(s.shape[0] == 1 and s.shape[1] <= HELD_OUT_TOKENS for s in made.held_out)


def test_make_samples_takes_equal_shares() -> None:
    """Short texts give all they have, long ones share the rest equally."""
    made = make_samples(TOKENIZER, [text(0, 100), text(1, 9000), text(2, 9000), text(3, 9000)], max_tokens=6100)
    counts = torch.tensor(flat(made.statistics)).div(1_000_000, rounding_mode="floor").bincount()
    assert counts[0] == 100
    assert (counts[1:] >= 2000 - 16).all() and (counts[1:] <= 2000).all()


def test_make_samples_is_shuffled_by_its_seed() -> None:
    texts = [text(i, 2000) for i in range(8)]
    first, again, other = (make_samples(TOKENIZER, texts, max_tokens=8000, seed=s) for s in (0, 0, 1))
    assert flat(first.statistics) == flat(again.statistics) and flat(first.held_out) == flat(again.held_out)
    assert flat(first.statistics) != flat(other.statistics)
    assert sorted(flat(first.statistics)) == sorted(flat(other.statistics))


def test_samples_begin_as_every_text_does() -> None:
    tokenizer = NumberTokenizer()
    tokenizer.lead = (-2, -1)
    made = make_samples(tokenizer, [text(i, 3000) for i in range(4)], max_tokens=5000)
    for sample in (*made.statistics, *made.held_out):
        assert sample[0, :2].tolist() == [-2, -1] and (sample[0, 2:] >= 0).all()
    assert all(s.shape[1] <= SAMPLE_TOKENS for s in made.statistics) and all(w.shape[1] == HELD_OUT_TOKENS for w in made.held_out)
    body = [token for s in made.statistics for token in s[0, 2:].tolist()]
    assert len(set(body)) == len(body)


def test_make_samples_takes_the_first_n_texts() -> None:
    made = make_samples(TOKENIZER, [text(i, 1000) for i in range(6)], n_samples=2)
    assert {t // 1_000_000 for t in flat(made.statistics) + flat(made.held_out)} == {0, 1}


@pytest.mark.parametrize("length", [1, 20, 255])
def test_make_samples_rejects_too_short(length: int) -> None:
    with pytest.raises(CalibrationError, match=f"has {length} tokens, which is too short: at least 256 are needed"):
        make_samples(TOKENIZER, [text(0, length)])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "one string; expected a list of strings"),
        (b"bytes", "one string"),
        ([], "is empty; pass None"),
        ((), "is empty; pass None"),
        ({"a": 1}, "is a dict; expected a list"),
        (7, "is a int; expected a list"),
        (["a", 3], r"calibration_texts\[1\] is 3"),
        (["a", None], r"calibration_texts\[1\] is None"),
        (["a", " \n"], r"calibration_texts\[1\] is ' \\n'"),
        ([["a"]], r"calibration_texts\[0\] is \['a'\]"),
    ],
)
def test_make_samples_rejects_what_is_no_list_of_texts(texts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_samples(TOKENIZER, texts)


@pytest.mark.parametrize("count", [0, 4, 1.5])
def test_check_texts_rejects_counts(count: Any) -> None:
    with pytest.raises(ConfigError, match=f"n_samples={count}"):
        check_texts(["a", "b", "c"], count)


def test_check_texts_copies() -> None:
    texts = ["a", "b"]
    checked = check_texts(texts, None)
    assert checked == texts and checked is not texts
    assert check_texts(("a", "b"), 1) == ["a"]


def test_get_default_calibration_texts_are_64_different_texts() -> None:
    texts = get_default_calibration_texts()
    assert len(texts) == len(set(texts)) == 64
    assert all(len(t) >= 500 for t in texts), "not by words: some languages have no spaces"


@pytest.mark.parametrize("count", [1, 3, 12, 63, 64])
def test_get_default_calibration_texts_spreads_evenly(count: int) -> None:
    texts = get_default_calibration_texts()
    at = [texts.index(t) for t in get_default_calibration_texts(count)]
    gaps = [b - a for a, b in pairwise(at)]
    assert len(at) == count and at == sorted(set(at))
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [0, 65, 2.5])
def test_get_default_calibration_texts_rejects_counts(count: Any) -> None:
    with pytest.raises(ConfigError, match="n_samples="):
        get_default_calibration_texts(count)


def test_get_default_calibration_texts_gives_a_list_of_its_own() -> None:
    get_default_calibration_texts().clear()
    assert len(get_default_calibration_texts()) == 64
