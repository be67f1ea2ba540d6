"""The example scripts, from their command lines, on a tiny model saved to a folder."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from example_scripts import script
from tiny_models import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spectralquant.evaluation.methods import METHODS, ours
from spectralquant.presets import PRESETS

Row = dict[str, Any]


@pytest.fixture(scope="module")
def perplexity() -> ModuleType:
    return script("run_perplexity")


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    return script("sweep_compression")


@pytest.fixture(autouse=True)
def _methods_as_before() -> Iterator[None]:
    """The sweep adds its dial settings to the methods."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny llama, for which `llama_calibration` was made, and a tokenizer of one token per character."""
    folder = tmp_path_factory.mktemp("model")
    special = ["<pad>", "<s>", "</s>", "<unk>", "\n"]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*special, *map(chr, range(32, 127))])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"(.|\n)"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """The arguments for two short texts."""
    for name, line in (("squares", "Line {} of {}.\n"), ("rhymes", "{} bottles, {} bottles on the wall,\n")):
        (tmp_path / f"{name}.txt").write_text("".join(line.format(i, i * i) for i in range(100)), encoding="utf-8")
    return [f"--text={name}={tmp_path / f'{name}.txt'}" for name in ("squares", "rhymes")]


def rows_of(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


# run_perplexity -------------------------------------------------------------------------------------------------------


def test_perplexity_table_is_that_of_the_rows(
    perplexity: ModuleType, model: str, llama_calibration: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["--model", model, "--calibration", str(llama_calibration), "--context", "260", "--windows", "2", "--preset", "high", "--out", str(out)]
    assert perplexity.main([*arguments, *texts]) == 0
    header, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.split() == ["text", "method", "bits", "ratio", "ppl", "plain", "ppl", "ppl", "ratio", "KL", "same", "token"]
    rows = rows_of(out)
    assert {(r["text"], r["method"], r["window"]) for r in rows} == {(t, m, w) for t in ("squares", "rhymes") for m in ("fp16", "high") for w in (0, 1)}
    assert len(lines) == 4
    for line, (text, name) in zip(lines, [(t, m) for t in ("squares", "rhymes") for m in ("fp16", "high")], strict=True):
        mine = [r for r in rows if (r["text"], r["method"]) == (text, name)]
        assert line.startswith(text) and METHODS[name].label in line
        figures = line.split(METHODS[name].label)[1].replace("x", "").replace("±", "").replace("%", "").split()
        bits, ratio, plain, ppl, ppl_ratio, kl, error, agreement = map(float, figures)
        windows = [mean(r["kl"]) for r in mine]
        assert bits == pytest.approx(mean([r["bits"] for r in mine]), abs=0.005) and ratio == pytest.approx(16 / bits, rel=0.01)
        assert plain == pytest.approx(math.exp(mean(mine[0]["nll_plain"] + mine[1]["nll_plain"])), abs=6e-4)
        assert ppl == pytest.approx(math.exp(mean(mine[0]["nll"] + mine[1]["nll"])), abs=6e-4)
        assert ppl_ratio == pytest.approx(ppl / plain, abs=1e-4)
        assert kl == pytest.approx(mean(windows), abs=6e-5) and error == pytest.approx(abs(windows[0] - windows[1]) / 2, abs=6e-5)
        assert agreement == pytest.approx(100 * mean(mine[0]["agree"] + mine[1]["agree"]), abs=0.06)


def test_perplexity_leaves_nothing_behind_without_a_folder(
    perplexity: ModuleType, model: str, llama_calibration: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    there = set(tmp_path.iterdir())
    arguments = ["--model", model, "--calibration", str(llama_calibration), "--context", "200", "--windows", "1", "--preset", "max", texts[0]]
    assert perplexity.main(arguments) == 0
    assert set(tmp_path.iterdir()) == there and not list(scratch.iterdir())


def test_perplexity_goes_on_in_its_folder(
    perplexity: ModuleType, model: str, llama_calibration: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run measures what is new, and shows what was asked for."""
    common = ["--model", model, "--calibration", str(llama_calibration), "--context", "200", "--windows", "1", "--out", str(tmp_path / "run"), texts[0]]
    assert perplexity.main([*common, "--preset", "max"]) == 0
    first = rows_of(tmp_path / "run")
    capsys.readouterr()
    assert perplexity.main([*common, "--preset", "high"]) == 0
    second = rows_of(tmp_path / "run")
    assert second[: len(first)] == first and [r["method"] for r in second] == ["fp16", "max", "high"]
    shown = capsys.readouterr().out
    assert "spectralquant high" in shown and "spectralquant max" not in shown


def test_calibration_is_written_where_it_is_missing(perplexity: ModuleType, model: str, texts: list[str], tmp_path: Path) -> None:
    arguments = ["--model", model, "--calibration", str(tmp_path / "own"), "--context", "200", "--windows", "1", "--preset", "max", texts[0]]
    assert perplexity.main(arguments) == 0
    written = tmp_path / "own.safetensors"
    before = written.read_bytes()
    assert perplexity.main(arguments) == 0
    assert written.read_bytes() == before


# sweep_compression ----------------------------------------------------------------------------------------------------


def test_sweep_shows_the_rows(sweep: ModuleType, model: str, llama_calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "run", tmp_path / "new" / "sweep.png"
    arguments = ["--model", model, "--calibration", str(llama_calibration), "--context", "200", "--windows", "1", "--out", str(out)]
    assert sweep.main([*arguments, "--dials", "--target-kl", "1e9", "--plot", str(picture)]) == 0
    *lines, target = capsys.readouterr().out.splitlines()
    names = [*PRESETS, *(method.name for method in sweep.DIALS)]
    rows = {name: [r for r in rows_of(out) if r["method"] == name] for name in names}
    figures = {METHODS[name].label: (mean([r["bits"] for r in mine]), mean([k for r in mine for k in r["kl"]])) for name, mine in rows.items()}
    assert len(lines) == len(figures) == len(PRESETS) + 7
    shown = []
    for line in lines:
        label = next(label for label in figures if label in line)
        bits, ratio, kl, _ = map(float, line.split(label)[1].replace("bits", "").replace("KL", "").replace("x", "").replace("±", "").split())
        assert bits == pytest.approx(figures[label][0], abs=0.005) and ratio == pytest.approx(16 / bits, rel=0.01)
        assert kl == pytest.approx(figures[label][1], abs=6e-5)
        shown.append((label, line.startswith("*")))
    assert [label for label, _ in shown] == sorted(figures, key=figures.__getitem__)
    assert {label for label, marked in shown if marked} == front(figures)
    assert target.startswith(f"smallest cache with KL <= 1e+09: {shown[0][0]}, ")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def front(figures: dict[str, tuple[float, float]]) -> set[str]:
    """Walking from small to large, those that have less KL than all smaller ones; of equal size, only those with the least KL."""
    found: set[str] = set()
    least = math.inf
    for bits in sorted({bits for bits, _ in figures.values()}):
        here = min(kl for b, kl in figures.values() if b == bits)
        if here < least:
            found |= {name for name, point in figures.items() if point == (bits, here)}
            least = here
    return found


@pytest.mark.parametrize("seed", range(20))
def test_pareto_on_random_points(sweep: ModuleType, seed: int) -> None:
    """Few different values, so that there are ties in bits, in KL, and in both."""
    draws = torch.randint(1, 6, (12, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    points = [{"label": str(i), "bits": float(bits), "kl": float(kl)} for i, (bits, kl) in enumerate(draws)]
    best = sweep.pareto(points)
    assert {p["label"] for p in best} == front({p["label"]: (p["bits"], p["kl"]) for p in points})
    assert best == [p for p in points if p in best]


def test_dials_are_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str, dict[str, int]]] = []
    monkeypatch.setattr(ours, "method_for", lambda name, label, **options: made.append((name, label, options)))
    script("sweep_compression")
    for name, label, o in made:
        assert name == f"dials-{o['total_bits']}-{o['noise_bits']}-{o['value_noise_bits']}"
        assert label == f"avg {o['total_bits']}, tails K {o['noise_bits']} V {o['value_noise_bits']}"
    assert len({name for name, *_ in made}) == len(made) == 7 and {o["total_bits"] for *_, o in made} == {2, 3, 4}


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (0.5, "smallest cache with KL <= 0.5: small, 2.00 bits, KL 0.5000"),
        (0.3, "smallest cache with KL <= 0.3: better, 3.00 bits, KL 0.2000"),
        (0.1, "no setting has KL <= 0.1; the least is 0.2000"),
    ],
)
def test_target(sweep: ModuleType, target: float, text: str) -> None:
    points = [{"label": name, "bits": bits, "kl": kl} for name, bits, kl in (("small", 2.0, 0.5), ("better", 3.0, 0.2), ("same", 3.0, 0.3), ("big", 4.0, 0.25))]
    assert sweep.describe_target(points, target) == text


# Both -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run_perplexity", "sweep_compression"])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "nowhere.gguf"], "there is no such file"),
        (["--windows", "0"], "windows=0 is out of range"),
        (["--context", "0"], "contexts=0 is out of range"),
        (["--context", "1000000"], "too few for 1 windows"),
    ],
)
def test_bad_input_is_one_line(name: str, arguments: list[str], text: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script(name).main(["--model", model, "--windows", "1", *arguments]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith(name)]
    assert len(errors) == 1 and text in errors[0] and captured.err.rstrip().endswith(errors[0]) and not captured.out


@pytest.mark.parametrize("name", ["run_perplexity", "sweep_compression"])
def test_unusable_calibration_is_one_line(name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FP16 could be measured, but it is not what was asked for."""
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    arguments = ["--model", model, "--calibration", str(tmp_path / "broken"), "--context", "200", "--windows", "1", "--preset", "high"]
    assert script(name).main(arguments) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith(name) and "high" in error and "broken.safetensors" in error and not captured.out


@pytest.mark.parametrize("name", ["run_perplexity", "sweep_compression"])
@pytest.mark.parametrize("arguments", [["--preset", "tiny"], ["--preset", "kivi2-g32"]])
def test_unknown_preset_is_refused(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script(name).main(arguments)
    assert stop.value.code == 2 and f"invalid choice: '{arguments[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["book.txt", "=book.txt", "prose="])
def test_text_needs_a_name_and_a_source(perplexity: ModuleType, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        perplexity.main(["--text", argument])
    assert stop.value.code == 2 and "expected NAME=SOURCE" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["0", "-1", "nan"])
def test_target_must_be_positive(sweep: ModuleType, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([f"--target-kl={target}"]) == 2
    assert "--target-kl" in capsys.readouterr().err
