"""Divergence from the uncompressed model on text: KL, agreement and perplexity over the tokens that follow a stored context."""

from collections.abc import Iterator
from typing import Any

from transformers import DynamicCache

from spectralquant.corpus import leading_tokens
from spectralquant.evaluation.methods import Prepared, Subject
from spectralquant.evaluation.metrics import token_divergence
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.tasks.base import Task, Unit, continue_with, hand_over, read_context
from spectralquant.evaluation.texts import begin_with, read_text, spread_windows, tokenise


def units(plan: Plan, subject: Subject) -> list[Unit]:
    """One unit per text, context length and window. All contexts of a window end at the same token, so the tokens that are scored are the same."""
    found: list[Unit] = []
    lead = leading_tokens(subject.tokenizer)
    for name, source in plan.texts.items():
        ids = tokenise(subject.tokenizer, read_text(source))
        windows = spread_windows(ids, max(plan.contexts) + plan.scored, plan.windows, plan.seed, name)
        for context in plan.contexts:
            for i, window in enumerate(windows):
                tail = begin_with(lead, window[:, -(context + plan.scored) :])
                found.append(Unit(f"{name}/{context}/{i}", tail, {"text": name, "context": context, "window": i}))
    return found


def measure(unit: Unit, plan: Plan, subject: Subject, methods: dict[str, Prepared]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The reference is the model with all scored tokens at once after the uncompressed context."""
    model, split = subject.model, unit.fields["context"]
    ids = unit.content.to(model.device)
    context = read_context(model, ids[:, :split])
    want = continue_with(model, hand_over(context, DynamicCache()), ids[:, split:], plan.scored).log_softmax(-1)
    for name, method in methods.items():
        cache = hand_over(context, method.cache())
        bits, exact = method.bits(cache), method.exact(cache)
        got = continue_with(model, cache, ids[:, split:], plan.chunk).log_softmax(-1)
        columns: dict[str, Any] = {k: [float(f"{x:.5g}") for x in v.tolist()] for k, v in token_divergence(want, got, ids[0, split + 1 :]).items()}
        yield name, {**columns, "bits": bits, "whole_bits": (bits * (split - exact) + 16.0 * exact) / split}


LANGUAGE = Task("language", units, measure)
