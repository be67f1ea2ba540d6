"""Train a small encoder: a minute or so of one core, the same weights whenever the seed is the same.

    python benchmarks/encoders/train.py --task NAME --seed N --out FOLDER [--steps N]

AdamW with a linear start and a cosine to zero. The model goes to FOLDER/NAME-seedN (`save_pretrained`), its accuracy on the test set and the seconds it took
to FOLDER/NAME-seedN.json. Tasks: digits, textures, moving-digits, protein.
"""

import argparse
import math
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from base import Task
from files import describe
from tasks import TASKS, task_named
from tqdm import tqdm
from transformers import PreTrainedModel

from spectralquant.config import require_int
from spectralquant.errors import ConfigError
from spectralquant.files import write_json

START_SHARE, DECAY, CLIP = 0.1, 0.05, 1.0


def train(task: Task, model: PreTrainedModel, seed: int, steps: int) -> list[float]:
    """Trains `model` in place and leaves it in evaluation mode; the loss of every step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_share(step, steps))
    losses: list[float] = []
    model.train()
    with tqdm(islice(task.batches("train", seed), steps), total=steps, desc=f"{task.name}, seed {seed}", unit="step") as bar:
        for batch in bar:
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def rate_share(step: int, steps: int) -> float:
    """Of the peak learning rate."""
    start = max(1, round(START_SHARE * steps))
    return (step + 1) / start if step < start else (1 + math.cos(math.pi * (step - start) / max(1, steps - start))) / 2


@torch.no_grad()
def held_out_accuracy(task: Task, model: PreTrainedModel, seed: int) -> float:
    right = [(found.argmax(-1) == labels) for batch in task.batches("test", seed) for found, labels in [task.scored(model(**batch).logits, batch)]]
    return float(torch.cat(right).double().mean())


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    task = task_named(args.task)
    model, steps = task.build(args.seed), task.steps if args.steps is None else args.steps
    began = time.perf_counter()
    losses = train(task, model, args.seed, steps)
    seconds = time.perf_counter() - began
    accuracy = held_out_accuracy(task, model, args.seed)
    model.save_pretrained(args.out / f"{task.name}-seed{args.seed}")
    row: dict[str, Any] = {"task": task.name, "seed": args.seed, "steps": steps, "accuracy": accuracy, "seconds": round(seconds, 1)}
    row |= {"loss": losses[-1], "parameters": model.num_parameters()}
    write_json(args.out / f"{task.name}-seed{args.seed}.json", {**describe("train", argv), **row})
    print(f"{task.name}, seed {args.seed}: accuracy {accuracy:.4f} on the test set, {seconds:.1f} s")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, data and split (default 0)")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the model goes; there already")
    parser.add_argument("--steps", type=int, metavar="N", help="batches to train on (default: the task's)")
    args = parser.parse_args(argv)
    task_named(args.task)
    require_int("--seed", args.seed, 0)
    if args.steps is not None:
        require_int("--steps", args.steps, 1)
    if not args.out.is_dir():
        raise ConfigError(f"--out {args.out}: expected a folder that is there; make it first")
    return args


if __name__ == "__main__":
    main()
