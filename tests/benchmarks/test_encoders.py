"""benchmarks/encoders: what the tasks promise of their data, training, and what is measured, with a double of the engine where figures must be known."""

import importlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectralquant.errors import ConfigError
from spectralquant.integrations import EncoderEngine

pytest.importorskip("sklearn")

SCRIPTS = ("base", "digits", "files", "measure", "moving_digits", "protein", "summary", "tasks", "textures", "train")
NAMES = ("digits", "textures", "moving-digits", "protein")
SHAPES = {"digits": (1, 8, 8), "textures": (1, 32, 32), "moving-digits": (8, 1, 16, 16)}
CLASSES = {"digits": 10, "textures": 8, "moving-digits": 40}


class Double:
    """EncoderEngine that rounds keys and values to a grid, and leaves them as they are at 8 bits; it wants what the engine wants."""

    made: list["Double"]

    def __init__(self, compression: str | None = None, bits: int | None = None) -> None:
        assert (compression is None) != (bits is None)
        self.bits, self.seen = bits, []
        self.made.append(self)

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        self.seen = list(batches)
        model(**self.seen[0])

    def codecs(self, model: nn.Module) -> dict[str, Any]:
        return {"first": SimpleNamespace(layout=SimpleNamespace(key_planes=48, value_planes=32))}

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        assert self.seen, "applied before calibration"
        sides = [m for name, m in model.named_modules() if name.split(".")[-1] in ("key", "value", "k_proj", "v_proj")]
        assert sides
        hooks = [m.register_forward_hook(lambda m, i, out: out if self.bits else (2 * out).round() / 2) for m in sides]
        yield
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts as modules; they leave nothing behind in `sys`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "encoders"))
        for name in (*SCRIPTS, "calibration", "calibration_report"):
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
        for name in (*SCRIPTS, "calibration", "calibration_report"):
            sys.modules.pop(name, None)


@pytest.fixture
def small(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """With test sets of two batches, and the double."""
    whole = scripts.digits.split_digits
    monkeypatch.setattr(scripts.digits, "split_digits", lambda split, seed: tuple(t[:64] for t in whole(split, seed)))
    for module in (scripts.textures, scripts.moving_digits, scripts.protein):
        monkeypatch.setattr(module, "TEST_BATCHES", 2)
    monkeypatch.setattr(Double, "made", [], raising=False)
    monkeypatch.setattr(scripts.measure, "EncoderEngine", Double)
    return scripts


def first(task: Any, split: str, seed: int) -> dict[str, Tensor]:
    return next(iter(task.batches(split, seed)))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", NAMES[:3])
def test_images_and_clips_have_their_shapes_and_all_classes(scripts: SimpleNamespace, name: str, split: str) -> None:
    found = list(islice(scripts.tasks.TASKS[name].batches(split, 3), 12))
    assert {tuple(b["pixel_values"].shape[1:]) for b in found} == {SHAPES[name]}
    assert all(len(b["labels"]) == len(b["pixel_values"]) and b["pixel_values"].isfinite().all() for b in found)
    assert set(torch.cat([b["labels"] for b in found]).tolist()) == set(range(CLASSES[name]))


@pytest.mark.parametrize("name", NAMES)
def test_models_take_batches_as_keyword_arguments(scripts: SimpleNamespace, name: str) -> None:
    task = scripts.tasks.TASKS[name]
    model, batch = task.build(0), first(task, "test", 0)
    out = model(**batch)
    scored, labels = task.scored(out.logits, batch)
    assert scored.shape == (len(labels), model.config.num_labels if name != "protein" else 33)
    assert torch.nn.functional.cross_entropy(scored, labels).item() == pytest.approx(out.loss.item(), rel=1e-5)
    assert task.score(one_hot_logits(batch["labels"], scored.shape[-1]), batch) == 1.0
    heads = model.config.hidden_size // model.config.num_attention_heads
    assert heads == 64 and not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))


def one_hot_logits(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels.clamp_min(0), classes).float()


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_everything(small: SimpleNamespace, name: str) -> None:
    task = small.tasks.TASKS[name]
    weights = [torch.cat([p.flatten() for p in task.build(seed).parameters()]) for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    for split in ("train", "test"):
        one, same, other = (first(task, split, seed) for seed in (1, 1, 2))
        assert all(torch.equal(one[k], same[k]) for k in one)
        assert not torch.equal(one["labels"], other["labels"])
    assert not torch.equal(first(task, "train", 1)["labels"], first(task, "test", 1)["labels"])
    assert sum(1 for _ in task.batches("test", 1)) == sum(1 for _ in task.batches("test", 2))


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss(scripts: SimpleNamespace, name: str) -> None:
    """On one batch again and again, which a model that learns at all learns by heart."""
    task = scripts.tasks.TASKS[name]
    batch = {k: v[:8] for k, v in first(task, "train", 0).items()}
    model = task.build(0)
    losses = scripts.train.train(replace(task, batches=lambda split, seed: repeat(batch)), model, 0, 24)
    assert len(losses) == 24 and losses[-1] < 0.6 * losses[0]
    assert not model.training


def test_the_rate_rises_then_falls_to_nothing(scripts: SimpleNamespace) -> None:
    shares = [scripts.train.rate_share(step, 100) for step in range(101)]
    assert shares[:11] == pytest.approx([*(i / 10 for i in range(1, 11)), 1.0])
    assert shares[10:] == sorted(shares[10:], reverse=True) and shares[100] == pytest.approx(0)


def test_no_scan_is_in_both_splits(scripts: SimpleNamespace) -> None:
    from sklearn.datasets import load_digits

    (test, a), (train, b) = (scripts.digits.split_digits(split, 5) for split in ("test", "train"))
    assert len(test) == 449 and len(train) == 1348
    scans, digits = load_digits(return_X_y=True)
    both = sorted([(*s.flatten().mul(16).tolist(), d) for s, d in zip(torch.cat((test, train)), torch.cat((a, b)).tolist(), strict=True)])
    assert both == sorted((*s.tolist(), d) for s, d in zip(scans, digits.tolist(), strict=True))


def test_digits_are_shifted_by_a_pixel_at_most(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.digits, "NOISE", 0.0)
    scan = torch.rand(1, 8, 8)
    padded = torch.nn.functional.pad(scan, (1, 1, 1, 1))[0]
    allowed = {padded[r : r + 8, c : c + 8].numpy().tobytes() for r in range(3) for c in range(3)}
    found = {s.numpy().tobytes() for s in scripts.digits.varied(scan.expand(300, -1, -1), torch.Generator().manual_seed(0))}
    assert found == allowed


def test_textures_differ_in_their_spectra_alone(scripts: SimpleNamespace) -> None:
    """Mean 0 and variance 1 in every class, and its own filter fits a texture's spectrum best."""
    module, gains = scripts.textures, scripts.textures.filters()
    labels = torch.arange(8).repeat_interleave(200)
    found = module.texture(labels, gains, torch.Generator().manual_seed(0))
    assert found.mean((1, 2)).abs().max() < 1e-5
    assert found.square().mean((1, 2)).view(8, 200).mean(1) == pytest.approx(torch.ones(8), abs=0.05)
    power, model = torch.fft.fft2(found).abs().square() / module.SIDE**2, gains.square() + 1e-3
    likelihood = -(power[:, None] / model + model.log()).sum((-1, -2))
    assert (likelihood.argmax(1) == labels).float().mean() > 0.95


def test_a_patch_of_another_class_is_in_every_image(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With textures that are their class's number everywhere, and nothing on top but a contrast and a mean."""
    module = scripts.textures
    monkeypatch.setattr(module, "NOISE", 0.0)
    monkeypatch.setattr(module, "texture", lambda labels, gains, random: 1000.0 * (1 + labels[:, None, None].expand(-1, module.SIDE, module.SIDE)))
    labels = torch.arange(8).repeat(20)
    found = module.images(labels, module.filters(), torch.Generator().manual_seed(0))
    levels = found / found.amin((1, 2), keepdim=True)
    other = (levels - levels.median(-1).values.median(-1).values[:, None, None]).abs() > 0.05
    assert (other.sum((1, 2)) == module.COVERED**2).all()


def test_a_frame_says_nothing_of_the_motion(scripts: SimpleNamespace) -> None:
    """Over all starts, every frame's pictures are the same whatever the direction; and backwards is the opposite direction."""
    module = scripts.moving_digits
    starts = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    scan = torch.rand(1, 8, 8).expand(256, -1, -1)
    found = [module.clips(scan, torch.full((256,), d), starts) for d in range(4)]
    for frame in range(module.FRAMES):
        pictures = [sorted(clip.numpy().tobytes() for clip in clips[:, frame]) for clips in found]
        assert pictures[0] == pictures[1] == pictures[2] == pictures[3] and len(set(pictures[0])) == 256
    for d in range(4):
        ends = (starts + (module.FRAMES - 1) * module.DIRECTIONS[d]) % 16
        assert torch.equal(found[d].flip(1), module.clips(scan, torch.full((256,), d ^ 1), ends))
        assert not torch.equal(found[d], found[d ^ 1])


def test_a_clip_moves_by_a_pixel_per_frame(scripts: SimpleNamespace) -> None:
    module = scripts.moving_digits
    for d, (down, right) in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
        (clip,) = module.clips(torch.rand(1, 8, 8), torch.tensor([d]), torch.tensor([[13, 2]]))
        assert all(torch.equal(clip[t + 1], clip[t].roll((down, right), (0, 1))) for t in range(module.FRAMES - 1))


def test_the_label_of_a_clip_is_digit_and_direction(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    module = scripts.moving_digits
    monkeypatch.setattr(module, "NOISE", 0.0)
    monkeypatch.setattr(module, "split_digits", lambda split, seed: ((torch.arange(10) + 1.0)[:, None, None].expand(-1, 8, 8) / 10, torch.arange(10)))
    batch = first(scripts.tasks.TASKS["moving-digits"], "train", 0)
    video = (batch["pixel_values"][:, :, 0] + 1) / 2
    assert torch.equal((video.amax((1, 2, 3)) * 10).round().long() - 1, batch["labels"] // 4)
    for clip, label in zip(video, batch["labels"], strict=True):
        step = module.DIRECTIONS[label % 4].tolist()
        assert torch.allclose(clip[1], clip[0].roll(step, (0, 1)), atol=1e-5)


def test_proteins_have_their_contacts_and_motifs(scripts: SimpleNamespace) -> None:
    module, random = scripts.protein, torch.Generator().manual_seed(0)
    table = module.partners()
    assert torch.equal(table[table], torch.arange(20))
    for family, (motif, distance) in enumerate(module.FAMILIES):
        shares = []
        for _ in range(30):
            protein = module.draw_protein(family, random)
            residues, later = protein.residues, protein.contact.nonzero()[:, 0]
            assert module.SHORTEST <= len(residues) <= module.LONGEST and later.min() >= distance
            assert torch.equal(residues[later], table[residues[later - distance]])
            assert not (protein.in_motif[later] | protein.in_motif[later - distance]).any()
            told = set(later.tolist()) | set((later - distance).tolist()) | set(protein.in_motif.nonzero()[:, 0].tolist())
            assert set(protein.maskable.nonzero()[:, 0].tolist()) == told
            assert "".join(module.RESIDUES[r] for r in residues[protein.in_motif]) == motif * module.COPIES
            free = ~protein.in_motif
            free[distance:] &= ~protein.in_motif[:-distance]
            free[:distance] = False
            shares.append(len(later) / int(free.sum()))
        assert sum(shares) / len(shares) == pytest.approx(1 - module.BROKEN, abs=0.03)


def test_batches_of_proteins_are_padded_and_masked(scripts: SimpleNamespace) -> None:
    module = scripts.protein
    found = list(islice(module.batches("train", 0), 20))
    masked = told = 0
    for batch in found:
        ids, attention, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        lengths = attention.sum(1)
        assert len(set(lengths.tolist())) > 1 and lengths.max() == ids.shape[1]
        assert torch.equal(attention.bool(), torch.arange(ids.shape[1]) < lengths[:, None]) and torch.equal(attention == 0, ids == module.PAD)
        assert (ids[:, 0] == module.CLS).all() and (ids.gather(1, lengths[:, None] - 1) == module.EOS).all()
        assert torch.equal(labels != -100, ids == module.MASK)
        assert ((labels[labels != -100] >= 4) & (labels[labels != -100] < 24)).all()
        masked, told = masked + int((ids == module.MASK).sum()), told + int(lengths.sum() - 2 * len(ids))
    assert 0.10 < masked / told < module.MASKED


def test_train_then_measure(small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("digits", 0), ("protein", 0), ("protein", 1)):
        small.train.main(["--task", name, "--seed", str(seed), "--out", str(tmp_path), "--steps", "3"])
    trained = {(r["task"], r["seed"]): r for r in (json.loads(p.read_text()) for p in tmp_path.glob("*.json"))}
    assert trained.keys() == {("digits", 0), ("protein", 0), ("protein", 1)}
    assert f"accuracy {trained['protein', 1]['accuracy']:.4f}" in capsys.readouterr().out
    out = tmp_path / "result" / "encoders.json"
    out.parent.mkdir()
    small.measure.main(["--models", str(tmp_path), "--out", str(out), "--calibration-batches", "2"])
    document = json.loads(out.read_text())
    assert str(tmp_path) not in document["command"]
    assert [(r["task"], r["seed"]) for r in document["rows"]] == [k for k in sorted(trained) for _ in range(4)]
    for row in document["rows"]:
        assert row["accuracy_uncoded"] == pytest.approx(trained[row["task"], row["seed"]]["accuracy"])
        assert (row["head_dim"], row["key_bits"], row["value_bits"]) == (64, 1.5, 1.0)
        assert row["accuracy_difference"] == pytest.approx(row["accuracy_coded"] - row["accuracy_uncoded"])
        assert (row["cosine"] == pytest.approx(1, abs=1e-9)) == (row["setting"] == "8 bits")
        assert (row["kl"] == pytest.approx(0, abs=1e-12)) == (row["setting"] == "8 bits")
    assert [(s["task"], s["setting"], s["seeds"]) for s in document["summary"]] == [
        (task, setting, seeds) for task, seeds in (("digits", 1), ("protein", 2)) for setting in ("standard", "high", "max", "8 bits")
    ]
    assert [c["task"] for c in document["claims"]] == ["digits", "protein"]


def test_calibration_reads_training_data_without_labels(small: SimpleNamespace, tmp_path: Path) -> None:
    small.train.main(["--task=digits", "--seed=4", f"--out={tmp_path}", "--steps=1"])
    (trained,) = small.measure.trained_models(tmp_path)
    small.measure.measure(trained, "high", 3)
    want = islice(small.tasks.TASKS["digits"].batches("train", 4), 3)
    (engine,) = Double.made
    assert [b.keys() for b in engine.seen] == [{"pixel_values"}] * 3
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(engine.seen, want, strict=True))


@pytest.mark.parametrize("name", ["digits", "moving-digits", "protein"])
def test_the_engine_serves_every_kind_of_model(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """No double: codes change what a model says, and those of 8 bits hardly do."""
    monkeypatch.setattr(small.measure, "EncoderEngine", EncoderEngine)
    small.train.main([f"--task={name}", "--seed=0", f"--out={tmp_path}", "--steps=5"])
    (trained,) = small.measure.trained_models(tmp_path)
    coarse, fine = (small.measure.measure(trained, setting, 4) for setting in ("max", "8 bits"))
    assert (fine["key_bits"], fine["value_bits"]) == (8, 8) and coarse["key_bits"] < 4
    assert fine["cosine"] > 0.9999 and 0 < fine["kl"] < coarse["kl"] and coarse["cosine"] < fine["cosine"]


def test_training_is_the_same_again(small: SimpleNamespace, tmp_path: Path) -> None:
    saved = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        small.train.main(["--task=protein", "--seed=2", f"--out={tmp_path / name}", "--steps=2"])
        saved.append((tmp_path / name / "protein-seed2" / "model.safetensors").read_bytes())
    assert saved[0] == saved[1]


def test_padding_does_not_count_as_hidden_states(small: SimpleNamespace) -> None:
    task = small.tasks.TASKS["protein"]
    batch = first(task, "test", 0)
    with torch.no_grad():
        answer = small.measure.answer(task.build(0), task, batch)
    assert len(answer.hidden) == int(batch["attention_mask"].sum()) < batch["input_ids"].numel()
    assert answer.logp.exp().sum(-1) == pytest.approx(torch.ones(len(answer.labels), dtype=torch.float64))


def test_intervals_are_student_s(scripts: SimpleNamespace) -> None:
    """12.7062 and 2.7764 are the 97.5 % points of t with 1 and 4 degrees of freedom."""
    two = scripts.summary.interval([1.0, 3.0])
    assert [two["low"], two["mean"], two["high"]] == pytest.approx([2 - 12.7062, 2, 2 + 12.7062], abs=1e-3)
    five = scripts.summary.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert five["high"] == pytest.approx(3 + 2.7764 * math.sqrt(2.5 / 5), abs=1e-3)
    assert scripts.summary.interval([0.5]) == {"mean": 0.5, "low": None, "high": None}


def test_claims_say_what_the_interval_says(scripts: SimpleNamespace) -> None:
    differences = {"up": [0.010, 0.011, 0.012], "down": [-0.010, -0.011, -0.012], "either": [-0.01, 0.0, 0.011], "one": [0.5]}
    figures = {**dict.fromkeys(scripts.summary.FIGURES, 0.0), "head_dim": 64, "key_bits": 2.0, "value_bits": 2.5}
    rows = [{**figures, "task": "t", "setting": k, "seed": i, "accuracy_difference": v} for k, vs in differences.items() for i, v in enumerate(vs)]
    summary = scripts.summary.summarise(rows)
    (claim,) = scripts.summary.claims(summary)
    shows = {setting: row["shows"] for setting, row in claim["accuracy_difference"].items()}
    assert shows == {"up": "better", "down": "worse", "either": "no difference beyond noise", "one": "nothing: one seed"}
    lines = scripts.summary.table(summary).splitlines()
    assert len(lines) == 5 and all(len(line) == len(lines[0]) and "2.00   2.50" in line for line in lines[1:])
    assert "1.10 +-0.25" in lines[1] and "50.00" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task=poems"], "--task poems: there is no such task; choose one of digits, textures"),
        (["--task=digits", "--seed=-1"], "--seed=-1 is out of range: expected an integer >= 0"),
        (["--task=digits", "--steps=0"], "--steps=0 is out of range: expected an integer >= 1"),
        (["--task=digits", "--out={}/nowhere"], "nowhere: expected a folder that is there; make it first"),
    ],
)
def test_train_rejects_bad_arguments(scripts: SimpleNamespace, tmp_path: Path, arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        scripts.train.main([f"--out={tmp_path}", *(a.format(tmp_path) for a in arguments)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "it holds no NAME-seedN.json, which train.py writes; train models into it first"),
        (["--models={}/nowhere"], "nowhere: expected a folder that is there; fill one with train.py first"),
        (["--calibration-batches=0"], "--calibration-batches=0 is out of range: expected an integer >= 1"),
        (["--out={}/nowhere/x.json"], "there is no folder .*nowhere; make it first"),
    ],
)
def test_measure_rejects_bad_arguments(scripts: SimpleNamespace, tmp_path: Path, arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        scripts.measure.main([f"--models={tmp_path}", f"--out={tmp_path / 'x.json'}", *(a.format(tmp_path) for a in arguments)])


def test_measure_rejects_models_of_other_tasks(scripts: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "poems-seed0.json").write_text('{"task": "poems", "seed": 0}')
    with pytest.raises(ConfigError, match=r"poems-seed0\.json has the task 'poems', expected one of digits"):
        scripts.measure.main([f"--models={tmp_path}", f"--out={tmp_path / 'x.json'}"])
