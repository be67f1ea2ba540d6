"""What a task of small encoders is: a model built in code, batches that are its keyword arguments, and the share of labels it gets right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

Batch = dict[str, Tensor]
Split = Literal["train", "test"]

IGNORED = -100
"""Label of a position that isn't scored, as in transformers' losses."""

SMALL: dict[str, Any] = {
    "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}  # fmt: skip
"""What models here have unless they say so: heads of 64, as most encoders have, and weights that are as large at the start as suits them."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: As the command line has it.
        model_class: transformers' class.
        config: Makes the model's configuration.
        batches: (split, seed) -> batches with labels. "test" is a fixed set; "train" is a stream that doesn't end, from other data.
        steps: Batches that training takes.
        learning_rate: Its peak.
    """

    name: str
    model_class: type[PreTrainedModel]
    config: Callable[[], PretrainedConfig]
    batches: Callable[[Split, int], Iterator[Batch]]
    steps: int
    learning_rate: float

    def build(self, seed: int) -> PreTrainedModel:
        """Random weights of this seed; the caller's random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model_class(self.config()).eval()

    def load(self, folder: Path) -> PreTrainedModel:
        """What training saved."""
        return self.model_class.from_pretrained(folder).eval()

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [N, classes] and labels [N] of what counts: each image or clip, or each masked residue."""
        counts = batch["labels"] != IGNORED
        return logits[counts], batch["labels"][counts]

    def score(self, logits: Tensor, batch: Batch) -> float:
        """Accuracy: the share of scored labels that have the largest logit."""
        found, labels = self.scored(logits, batch)
        return float((found.argmax(-1) == labels).double().mean())


def random_stream(split: Split, seed: int) -> torch.Generator:
    """One stream per split and seed."""
    return torch.Generator().manual_seed(2 * seed + (split == "test"))


def batch_numbers(split: Split, test_batches: int) -> Iterator[int]:
    """Numbers of batches: for ever in training, `test_batches` of them in the test set."""
    number = 0
    while split == "train" or number < test_batches:
        yield number
        number += 1
