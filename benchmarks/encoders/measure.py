"""What coded keys and values do to trained encoders: task accuracy, hidden states and output distributions beside those of the uncoded model.

    python benchmarks/encoders/measure.py --models FOLDER --out FILE [--calibration-batches N]

FOLDER is what train.py filled. Every model (task x seed) meets every setting: the presets `standard`, `high` and `max`, and `8 bits`. It is calibrated on
batches of its training data and measured on its test set. A row has

- key_bits, value_bits: of a coordinate, on average, without the gains. Records come in steps of 16 planes, so that presets may be the same codes where
  heads are small: at heads of 32 `standard`, `high` and `max` are;
- accuracy_uncoded, accuracy_coded, accuracy_difference: shares of scored labels (images, clips or masked residues), and coded minus uncoded;
- cosine: between final hidden states (the last of `hidden_states`) of the two, mean over tokens that aren't padding;
- kl: KL(uncoded || coded) of the distributions over classes or tokens in nats, mean over scored labels.

The summary has means over seeds with 95 % intervals (Student's t), paired by seed where it is a difference. `claims` says per task and setting whether coding
made a model better, worse or neither; these are many intervals, of which one in twenty leaves out zero by chance. FILE is written after every row.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from base import Batch, Task
from files import describe
from summary import claims, summarise, table
from tasks import TASKS
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from spectralquant.config import require_int
from spectralquant.errors import ConfigError
from spectralquant.files import write_json
from spectralquant.integrations import EncoderEngine

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"compression": "standard"}, "high": {"compression": "high"}, "max": {"compression": "max"}, "8 bits": {"bits": 8},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trained:
    """A model on disk."""

    task: Task
    seed: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one batch: log-probabilities [N, C] and labels [N] of what is scored, final hidden states [tokens, hidden] of all but padding."""

    logp: Tensor
    labels: Tensor
    hidden: Tensor

    @property
    def right(self) -> Tensor:
        return (self.logp.argmax(-1) == self.labels).double()


def trained_models(folder: Path) -> list[Trained]:
    """By task, then by seed."""
    found = []
    for path in folder.glob("*-seed*.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        if row.get("task") not in TASKS:
            raise ConfigError(f"--models {folder}: {path.name} has the task {row.get('task')!r}, expected one of {', '.join(TASKS)}; train it anew")
        found.append(Trained(TASKS[row["task"]], row["seed"], path.with_suffix("")))
    if not found:
        raise ConfigError(f"--models {folder}: it holds no NAME-seedN.json, which train.py writes; train models into it first")
    order = list(TASKS)
    return sorted(found, key=lambda t: (order.index(t.task.name), t.seed))


def inputs_of(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def calibration_batches(trained: Trained, count: int) -> Iterator[Batch]:
    return (inputs_of(batch) for batch in islice(trained.task.batches("train", trained.seed), count))


def answer(model: PreTrainedModel, task: Task, batch: Batch) -> Answer:
    out = model(**inputs_of(batch), output_hidden_states=True)
    logits, labels = task.scored(out.logits, batch)
    hidden = out.hidden_states[-1]
    mask = batch.get("attention_mask")
    return Answer(logits.double().log_softmax(-1), labels, hidden.flatten(0, 1) if mask is None else hidden[mask.bool()])


@torch.no_grad()
def compare(model: PreTrainedModel, engine: EncoderEngine, trained: Trained) -> dict[str, Any]:
    """The figures of one row."""

    def answers() -> list[Answer]:
        return [answer(model, trained.task, batch) for batch in trained.task.batches("test", trained.seed)]

    plain = answers()
    with engine.applied_to(model):
        coded = answers()
    accuracies = [float(torch.cat([a.right for a in found]).mean()) for found in (plain, coded)]
    cosine = torch.cat([torch.cosine_similarity(want.hidden.double(), got.hidden.double(), dim=-1) for want, got in zip(plain, coded, strict=True)])
    kl = torch.cat([(want.logp.exp() * (want.logp - got.logp)).sum(-1) for want, got in zip(plain, coded, strict=True)])
    return {
        "scored": len(kl), "accuracy_uncoded": accuracies[0], "accuracy_coded": accuracies[1], "accuracy_difference": accuracies[1] - accuracies[0],
        "cosine": float(cosine.mean()), "kl": float(kl.mean()),
    }  # fmt: skip


def measure(trained: Trained, setting: str, calibration: int) -> dict[str, Any]:
    model, engine = trained.task.load(trained.folder), EncoderEngine(**SETTINGS[setting])
    engine.calibrate(model, calibration_batches(trained, calibration))
    return {"task": trained.task.name, "seed": trained.seed, "setting": setting, **code_bits(model, engine), **compare(model, engine, trained)}


def code_bits(model: PreTrainedModel, engine: EncoderEngine) -> dict[str, float]:
    """Planes have 2 bits; all modules of a model have one layout here."""
    layout, dim = next(iter(engine.codecs(model).values())).layout, model.config.hidden_size // model.config.num_attention_heads
    return {"head_dim": dim, "key_bits": 2 * layout.key_planes / dim, "value_bits": 2 * layout.value_planes / dim}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    jobs = [(trained, setting) for trained in trained_models(args.models) for setting in SETTINGS]
    head = {**describe("measure", argv), "calibration_batches": args.calibration_batches}
    rows: list[dict[str, Any]] = []
    for trained, setting in tqdm(jobs, desc="measuring", unit="row"):
        rows.append(measure(trained, setting, args.calibration_batches))
        summary = summarise(rows)
        write_json(args.out, {**head, "summary": summary, "claims": claims(summary), "rows": rows})
        tqdm.write(" ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()))
    print(table(summarise(rows)))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, type=Path, metavar="FOLDER", help="what train.py filled")
    parser.add_argument("--calibration-batches", type=int, default=32, metavar="N", help="of the training data, per model (default 32)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON, written after every row")
    args = parser.parse_args(argv)
    require_int("--calibration-batches", args.calibration_batches, 1)
    if not args.models.is_dir():
        raise ConfigError(f"--models {args.models}: expected a folder that is there; fill one with train.py first")
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    return args


if __name__ == "__main__":
    main()
