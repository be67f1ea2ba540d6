"""Needles in a haystack: whether one made-up fact, at a known place of a long text, can still be read from the codes.

The context is a stretch of the plan's first text with one or more needles, each a line of its own. The question is the beginning of the
needle's line, and the model continues it: plain completion, which base models and small instruct models can both do; a chat template is
never used. The context is coded before the question is fed, so that every answer is read from codes. Some methods keep up to about 255 of
the newest tokens exact, so depth 1.0 tests little of those; it shows what the window is worth.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from spectralquant.corpus import leading_tokens
from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Prepared, Subject
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.tasks.base import Task, Unit, continue_with, generate_greedily, hand_over, read_context
from spectralquant.evaluation.texts import read_text, tokenise

DISTRACTORS = 7
"""Lines of the needle's form beside it in "multi-key"."""
REACH = 64
"""Tokens on either side of the wanted place in which a sentence or line boundary is looked for."""
SLACK = 12
"""Tokens that an answer may take beyond the expected one's own."""
PLACES = ("Lisbon", "Tromsø", "Cusco", "Hobart", "Nairobi", "Quebec", "Sapporo", "Tbilisi", "Valparaiso", "Windhoek", "Yerevan", "Zagreb")
ACTIVITIES = ("eat", "draw", "carry", "wave", "hide", "polish", "weigh", "photograph", "juggle", "borrow")
QUALITIES = ("purple", "frozen", "wooden", "striped", "tiny", "hollow", "golden", "crooked", "silent", "velvet")
THINGS = ("lantern", "sandwich", "trumpet", "umbrella", "cactus", "kettle", "feather", "ladder", "walnut", "compass")
SPOTS = ("under the old bridge", "behind the opera", "on the ferry", "beside the fountain", "at the night market", "in the clock tower")


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact: the line `stem` + " " + `answer` + `end` is hidden, `stem` is asked for."""

    stem: str
    answer: str
    end: str = ""

    @property
    def line(self) -> str:
        return f"\n{self.stem} {self.answer}{self.end}\n"


@dataclass(frozen=True, slots=True)
class Search:
    """One unit's work.

    Attributes:
        context: Ids [1, T] of the haystack with its needles.
        question: Ids [1, Q] of the beginning of the needle's line.
        answer: Ids [1, A] of the rest of it.
        expected: The answer as text.
    """

    context: Tensor
    question: Tensor
    answer: Tensor
    expected: str


@dataclass(frozen=True, slots=True)
class Haystack:
    """The text that haystacks are cut from.

    Attributes:
        name: In the plan.
        text: All of it; no answer occurs in it.
        ids: Its tokens.
        first: Special tokens that the tokenizer puts before a text.
        tokenizer: Of the model under test.
    """

    name: str
    text: str
    ids: list[int]
    first: list[int]
    tokenizer: Any


def units(plan: Plan, subject: Subject) -> list[Unit]:
    """One unit per kind, length, depth and sample; each has a needle and a stretch of text of its own.

    Raises:
        ConfigError: The plan has no text, or a length is too short for the needles or too long for the text.
    """
    haystack = read_haystack(plan, subject.tokenizer)
    found: list[Unit] = []
    for kind, length, depth, sample in itertools.product(plan.needle_kinds, plan.needle_lengths, plan.needle_depths, range(plan.needle_samples)):
        key = f"{kind}/{length}/{depth}/{sample}"
        search = make_search(haystack, kind, length, depth, random.Random(f"{plan.seed}/{key}"))
        found.append(Unit(key, search, {"kind": kind, "length": length, "depth": depth, "sample": sample}))
    return found


def measure(unit: Unit, plan: Plan, subject: Subject, methods: dict[str, Prepared]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Columns: `answer` (expected), `output`, `correct` (1 when the answer occurs in the output), `answer_nll` (mean negative log-likelihood
    of the answer's tokens, in nats, each given the ones before it), `bits` of the coded context.

    The likelihood tells methods apart where all of them answer alike.
    """
    model, search = subject.model, unit.content
    question, answer = search.question.to(model.device), search.answer.to(model.device)
    context = read_context(model, search.context.to(model.device))
    for name, method in methods.items():
        cache = hand_over(context, method.cache())
        bits = method.bits(cache)
        nll = _answer_nll(subject, cache, question, answer, plan.chunk)
        output = _complete(subject, hand_over(context, method.cache()), question, plan.chunk, answer.shape[1] + SLACK)
        columns = {"answer": search.expected, "output": output, "correct": int(search.expected in output), "answer_nll": float(f"{nll:.5g}")}
        yield name, {**columns, "bits": bits}


def _answer_nll(subject: Subject, cache: Cache, question: Tensor, answer: Tensor, chunk: int) -> float:
    """Mean over the tokens of answer [1, A] under teacher forcing."""
    logits = continue_with(subject.model, cache, torch.cat([question, answer[:, :-1]], 1), chunk)
    likely = logits[question.shape[1] - 1 :].log_softmax(-1)
    return float(-likely.gather(1, answer[0][:, None]).mean())


def _complete(subject: Subject, cache: Cache, question: Tensor, chunk: int, count: int) -> str:
    """The text that follows the question, to the end of its line."""
    tokenizer = subject.tokenizer

    def stop(tokens: list[int]) -> bool:
        return tokens[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode(tokens).lstrip()

    return tokenizer.decode(generate_greedily(subject.model, cache, question, chunk, count, stop), skip_special_tokens=True)


def read_haystack(plan: Plan, tokenizer: Any) -> Haystack:
    """The plan's first text.

    Raises:
        ConfigError: There is none.
    """
    if not plan.texts:
        raise ConfigError("texts is empty: the needles task hides its needles in the first text, name one")
    name, source = next(iter(plan.texts.items()))
    text = read_text(source)
    return Haystack(name, text, tokenise(tokenizer, text)[0].tolist(), leading_tokens(tokenizer), tokenizer)


def make_search(haystack: Haystack, kind: str, length: int, depth: float, rng: random.Random) -> Search:
    """A context of exactly `length` tokens, special ones included, with a new needle at `depth`; distractors lie evenly over it."""
    tokenizer = haystack.tokenizer
    asked, *others = _draw_needles(kind, haystack.text, rng)
    lines = {needle: list(tokenizer(needle.line, add_special_tokens=False)["input_ids"]) for needle in (asked, *others)}
    depths = [depth, *((i + 0.5) / len(others) for i in range(len(others)))]
    context = _hide(haystack, list(zip(depths, lines.values(), strict=True)), length, rng)
    question, answer = _split_line(tokenizer, f"\n\n{asked.stem}", f" {asked.answer}")
    return Search(torch.tensor([context]), torch.tensor([question]), torch.tensor([answer]), asked.answer)


def _draw_needles(kind: str, text: str, rng: random.Random) -> list[Needle]:
    """The asked needle first. No answer or stem occurs in `text` or twice."""
    needles: list[Needle] = []
    while len(needles) < (1 + DISTRACTORS if kind == "multi-key" else 1):
        needle = _draw_sentence(rng) if kind == "sentence" else _draw_pair(rng)
        taken = [text, *(other.line for other in needles)]
        if not any(needle.answer in t or needle.stem in t for t in taken):
            needles.append(needle)
    return needles


def _draw_sentence(rng: random.Random) -> Needle:
    place = rng.choice(PLACES)
    if rng.random() < 0.5:
        return Needle(f"The special magic number for {place} is", _draw_number(rng), ".")
    answer = f"{rng.choice(ACTIVITIES)} a {rng.choice(QUALITIES)} {rng.choice(THINGS)} {rng.choice(SPOTS)}"
    return Needle(f"The best thing to do in {place} is to", answer, ".")


def _draw_pair(rng: random.Random) -> Needle:
    """The key looks like a UUID."""
    key = f"{rng.getrandbits(128):032x}"
    return Needle("-".join((key[:8], key[8:12], key[12:16], key[16:20], key[20:])) + ":", _draw_number(rng))


def _draw_number(rng: random.Random) -> str:
    """Seven digits: one in nine million by chance."""
    return str(rng.randint(1_000_000, 9_999_999))


def _hide(haystack: Haystack, lines: list[tuple[float, list[int]]], length: int, rng: random.Random) -> list[int]:
    """Ids of a random stretch of the haystack with lines (depth, ids) put in, `length` in all."""
    size = length - len(haystack.first) - sum(len(line) for _, line in lines)
    if size < 1:
        raise ConfigError(f"needle_lengths has {length}: needles and special tokens alone take {length - size}, expected more than that")
    if size > len(haystack.ids):
        raise ConfigError(f"text {haystack.name!r} has {len(haystack.ids)} tokens, too few for a haystack of {length}: bring more text or ask for less")
    start = rng.randint(0, len(haystack.ids) - size)
    body = haystack.ids[start : start + size]
    placed = [(nearest_boundary(haystack.tokenizer, body, round(depth * size)), line) for depth, line in lines]
    out, done = list(haystack.first), 0
    for place, line in sorted(placed, key=lambda item: item[0]):
        out += body[done:place] + line
        done = place
    return out + body[done:]


def nearest_boundary(tokenizer: Any, ids: list[int], target: int) -> int:
    """The place in `ids` nearest to `target` before which a line or sentence ends; `target` itself when there is none within REACH tokens."""
    for distance in range(REACH + 1):
        for place in (target - distance, target + distance):
            if place in (0, len(ids)) or (0 < place < len(ids) and _ends(tokenizer, ids, place)):
                return place
    return target


def _ends(tokenizer: Any, ids: list[int], place: int) -> bool:
    left = tokenizer.decode(ids[place - 1 : place])
    # Decoded with its predecessor, because some tokenizers drop the space in front of a first token.
    right = tokenizer.decode(ids[place - 1 : place + 1])[len(left) :]
    return left.endswith("\n") or (left.rstrip()[-1:] in (".", "!", "?") and (left[-1:].isspace() or right[:1].isspace()))


def _split_line(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of `question` and `answer` as the tokenizer splits them in one text: a token over the joint belongs to the answer."""
    alone, whole = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (question, question + answer))
    joint = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    return whole[:joint], whole[joint:]


NEEDLES = Task("needles", units, measure)
