"""Arithmetic word problems, answered in steps and judged by the final number: errors of a cache add up over a long generation.

A prompt is eight worked examples and a question, in GSM8K's form (Cobbe et al. 2021, arXiv 2110.14168), whose answers end in "#### 42".
Problems are generated in batches of similar length with left padding. `generate` reads the prompt uncoded, as in use, so the first new token
is exact and every later one reads codes. What is coded is mostly the examples: methods with a recent window read a short question exactly.
Padded slots are told to this package's cache; simulated caches store them like tokens, which can widen the range of the group that holds the
padding's end. Sorting by length keeps the padding short.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from spectralquant.compat import cache_argument
from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Prepared, Subject
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.tasks.base import Task, Unit
from spectralquant.prompts import encode, strip_padding, with_pad_token
from spectralquant.untrusted import parse_json

EXAMPLES = 8
"""Worked examples before every question."""
BATCH = 32
NEW_TOKENS = 256
STOP = re.compile(r"\n\n|Question:")
"""Where an answer ends; base models go on with a question of their own."""
NUMBER = r"(?:(?<!\w)-)?\$?\d[\d,]*(?:\.\d+)?"
NAMES = ("Ava", "Ben", "Chloe", "Dario", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mona", "Nils", "Olga", "Priya")
GOODS = ("apples", "pencils", "marbles", "stickers", "cookies", "shells", "stamps", "buttons", "candles", "tickets")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, and its worked answer that ends in "#### 42"."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True, slots=True)
class Batch:
    """One unit's work: prompts, examples included, and the numbers they ask for."""

    prompts: list[str]
    expected: list[str]


def units(plan: Plan, subject: Subject) -> list[Unit]:
    """Batches of up to 16 problems, sorted by length over the whole set.

    Raises:
        ConfigError: The problem file is missing, damaged, or too short.
    """
    examples, asked = read_problems(Path(plan.problem_file).expanduser(), plan.problems) if plan.problem_file else make_problems(plan.problems, plan.seed)
    shots = "".join(f"{example.prompt} {example.answer}\n\n" for example in examples)
    lengths = [len(subject.tokenizer(problem.prompt)["input_ids"]) for problem in asked]
    order = sorted(range(len(asked)), key=lengths.__getitem__)
    found: list[Unit] = []
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        content = Batch([shots + asked[i].prompt for i in chosen], [final_number(asked[i].answer, strict=True) or "" for i in chosen])
        found.append(Unit(f"batch/{first // BATCH}", content, {"problem": chosen}))
    return found


def measure(unit: Unit, plan: Plan, subject: Subject, methods: dict[str, Prepared]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row is a batch: `problem` (numbers in the plan), `output`, `expected`, `correct` and `correct_strict` (0 or 1) are lists with one entry per
    problem, `bits` is the whole cache's after generation. `per_problem` takes rows apart.

    Strict: the number after "####" is the expected one. Otherwise the last number counts where there is no "####".
    """
    batch = unit.content
    for name, method in methods.items():
        cache = method.cache()
        output = answer_batch(subject, cache, batch.prompts)
        columns: dict[str, Any] = {"output": output, "expected": batch.expected}
        for column, strict in (("correct", False), ("correct_strict", True)):
            columns[column] = [int(final_number(text, strict) == want) for text, want in zip(output, batch.expected, strict=True)]
        yield name, {**columns, "bits": method.bits(cache)}


def per_problem(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of batches -> one row per problem and method, with "unit" and "correct" as `metrics.summarise_success` expects."""
    lists = ("output", "expected", "correct", "correct_strict")
    return [
        {"task": row["task"], "unit": f"problem/{number}", "method": row["method"], **{name: row[name][i] for name in lists}, "bits": row["bits"]}
        for row in rows
        for i, number in enumerate(row["problem"])
    ]


class _Ended(StoppingCriteria):
    """True for the rows whose new text, after `width` tokens of prompt, holds a stop."""

    def __init__(self, tokenizer: Any, width: int) -> None:
        self.tokenizer, self.width = tokenizer, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = [self.tokenizer.decode(row) for row in input_ids[:, self.width :].tolist()]
        return torch.tensor([STOP.search(text.lstrip()) is not None for text in texts], device=input_ids.device)


def answer_batch(subject: Subject, cache: Cache, prompts: list[str]) -> list[str]:
    """Greedy continuations of a left-padded batch, each up to its stop."""
    model, tokenizer = subject.model, subject.tokenizer
    inputs = encode(tokenizer, prompts, True, model.device)
    width = inputs.ids.shape[1]
    generated = model.generate(  # pyright: ignore
        inputs.ids,
        attention_mask=inputs.mask,
        max_new_tokens=NEW_TOKENS,
        stopping_criteria=StoppingCriteriaList([_Ended(tokenizer, width)]),
        **cache_argument(model, cache),
        # Penalties that a model's own configuration may ask for would hide what the cache does.
        **with_pad_token(model, tokenizer, {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}),
    )
    texts = [tokenizer.decode(strip_padding(row, tokenizer), skip_special_tokens=True) for row in generated[:, width:]]
    return [STOP.split(text.lstrip(), maxsplit=1)[0] for text in texts]


def final_number(text: str, strict: bool) -> str | None:
    """The number after "####" in plain digits ("1,200.00" and "$1200" are "1200"). Without one: None if `strict`, else the last number, if any."""
    marked = re.search(rf"####\s*({NUMBER})", text)
    if marked is not None:
        return _plain(marked[1])
    numbers = [] if strict else re.findall(NUMBER, text)
    return _plain(numbers[-1]) if numbers else None


def _plain(number: str) -> str:
    """Decimal's shortest form, without an exponent."""
    value = Decimal(number.replace("$", "").replace(",", ""))
    return f"{value.normalize():f}" if value else "0"


def read_problems(path: Path, count: int) -> tuple[list[Problem], list[Problem]]:
    """(examples, asked): the first EXAMPLES problems of a file in JSON lines, and the `count` that follow.

    Raises:
        ConfigError: There is no such file, it has too few problems, or a line is no problem.
    """
    if not path.is_file():
        raise ConfigError(f"problem_file={str(path)!r}: there is no such file; expected JSON lines with question and answer")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"problem_file={str(path)!r}: byte {error.start} is not UTF-8; expected JSON lines") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) < EXAMPLES + count:
        raise ConfigError(f"problem_file={str(path)!r} has {len(lines)} problems; expected at least {EXAMPLES} examples and problems={count} more")
    problems = [_parse(line, f"problem_file={str(path)!r}, line {i}") for i, line in lines[: EXAMPLES + count]]
    return problems[:EXAMPLES], problems[EXAMPLES:]


def _parse(line: str, where: str) -> Problem:
    try:
        record = parse_json(line, "it")
        problem = Problem(record["question"].strip(), record["answer"].strip())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {line!r:.60}; expected an object with the strings question and answer") from error
    if final_number(problem.answer, strict=True) is None:
        raise ConfigError(f'{where}: the answer ends in {problem.answer[-30:]!r}; expected "#### " and a number')
    return problem


def make_problems(count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(examples, asked): generated problems of two or three steps. Examples are the same for all seeds and show every template; none is asked."""
    examples = [TEMPLATES[i % len(TEMPLATES)](random.Random(f"example/{i}")) for i in range(EXAMPLES)]
    asked: list[Problem] = []
    taken = set(examples)
    for i in range(count):
        rng = random.Random(f"{seed}/problem/{i}")
        problem = rng.choice(TEMPLATES)(rng)
        while problem in taken:
            problem = rng.choice(TEMPLATES)(rng)
        taken.add(problem)
        asked.append(problem)
    return examples, asked


def _worked(question: str, *steps: str) -> Problem:
    """The number that ends the last step is the answer."""
    return Problem(question, "\n".join((*steps, f"#### {re.findall(NUMBER, steps[-1])[-1]}")))


def _shopping(rng: random.Random) -> Problem:
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    count, price, change = rng.randint(3, 12), rng.randint(2, 9), rng.randint(1, 40)
    cost = count * price
    return _worked(
        f"{name} buys {count} {goods} that cost ${price} each and pays with ${cost + change}. How many dollars does {name} get back?",
        f"The {goods} cost {count} * {price} = {cost} dollars.",
        f"{name} gets back {cost + change} - {cost} = {change} dollars.",
    )


def _sharing(rng: random.Random) -> Problem:
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    friends, each, eaten = rng.randint(2, 9), rng.randint(3, 12), rng.randint(2, 20)
    left = friends * each
    return _worked(
        f"{name} has {left + eaten} {goods}, loses {eaten} of them and shares the rest equally among {friends} friends. How many {goods} does each friend get?",
        f"After the loss there are {left + eaten} - {eaten} = {left} {goods}.",
        f"Each friend gets {left} / {friends} = {each} {goods}.",
    )


def _boxes(rng: random.Random) -> Problem:
    goods = rng.choice(GOODS)
    boxes, each, extra, sold = rng.randint(3, 12), rng.randint(4, 15), rng.randint(5, 30), rng.randint(2, 12)
    packed = boxes * each
    return _worked(
        f"A shop has {boxes} boxes with {each} {goods} in each, and {extra} loose {goods}. It sells {sold}. How many {goods} are left?",
        f"In the boxes are {boxes} * {each} = {packed} {goods}.",
        f"Together there are {packed} + {extra} = {packed + extra} {goods}.",
        f"After the sale there are {packed + extra} - {sold} = {packed + extra - sold} {goods}.",
    )


def _comparison(rng: random.Random) -> Problem:
    (first, second), goods = rng.sample(NAMES, 2), rng.choice(GOODS)
    count, factor, given = rng.randint(4, 20), rng.randint(2, 5), rng.randint(1, 9)
    more = count * factor
    return _worked(
        f"{first} has {count} {goods}. {second} has {factor} times as many and gets {given} more. How many {goods} do they have together?",
        f"At first {second} has {count} * {factor} = {more} {goods}.",
        f"Then {second} has {more} + {given} = {more + given} {goods}.",
        f"Together they have {count} + {more + given} = {count + more + given} {goods}.",
    )


def _wages(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    hours, days, wage = rng.randint(2, 8), rng.randint(2, 6), rng.randint(6, 20)
    total = hours * days
    return _worked(
        f"{name} works {hours} hours a day for {days} days and earns ${wage} an hour. How many dollars does {name} earn?",
        f"{name} works {hours} * {days} = {total} hours.",
        f"{name} earns {total} * {wage} = {total * wage} dollars.",
    )


def _reading(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    pages, days, rest = rng.randint(5, 25), rng.randint(3, 9), rng.randint(10, 90)
    read = pages * days
    return _worked(
        f"{name} reads {pages} pages a day of a book with {read + rest} pages. How many pages are left after {days} days?",
        f"In {days} days {name} reads {pages} * {days} = {read} pages.",
        f"There are {read + rest} - {read} = {rest} pages left.",
    )


TEMPLATES = (_shopping, _sharing, _boxes, _comparison, _wages, _reading)

PROBLEMS = Task("problems", units, measure)
