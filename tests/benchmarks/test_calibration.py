"""benchmarks/calibration.py: what its studies measure, that it goes on where it stopped, and its pictures."""

import argparse
import importlib.util
import json
import random
import re
import shutil
import sys
from collections import Counter
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import COMMON, TinyTokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.compat import cache_argument
from spectralquant.corpus import Samples, get_default_calibration_texts, leading_tokens, make_samples
from spectralquant.errors import ConfigError
from spectralquant.evaluation.texts import begin_with, spread_windows, tokenise

STUDIES = ("tokens", "kinds", "shift", "seeds", "menu")
CONTEXT, SCORED = 320, 32
Lines = list[dict[str, Any]]


def load_script() -> ModuleType:
    """The script as a module under a name of its own: a folder of these tests is called calibration too."""
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("calibration_script", folder / "calibration.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


script = load_script()
report = sys.modules["calibration_report"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random llama of one layer and one KV head."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=32)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "proj" in name:
                parameter.mul_(4.0)
    return made.eval()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two texts of 1200 random words."""
    folder = tmp_path_factory.mktemp("texts")
    paths = {}
    for seed, name in enumerate(("prose", "code")):
        words = random.Random(seed).choices([chr(97 + i) * j for i in range(26) for j in range(1, 5)], k=1200)
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(" ".join(words), encoding="utf-8")
    return paths


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    monkeypatch.setattr(script, "load_model", lambda name, dtype: (model, TinyTokenizer(), "tiny"))


def arguments(texts: dict[str, Path], out: Path, *studies: str, **options: Any) -> list[str]:
    chosen = {"context": CONTEXT, "windows": 2, "scored": SCORED, "halves": 2, "size": 1000, **options}
    argv = [f"--{key}={value}" for key, value in chosen.items()]
    return [*argv, *(f"--text={name}={path}" for name, path in texts.items()), *(f"--study={study}" for study in studies), f"--out={out}"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def of_study(lines: Lines, study: str) -> Lines:
    return [line for line in lines if line["study"] == study]


@pytest.fixture(scope="module")
def full(texts: dict[str, Path], model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run of all studies."""
    out = tmp_path_factory.mktemp("full") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_model", lambda name, dtype: (model, TinyTokenizer(), "tiny"))
        script.main(arguments(texts, out, *STUDIES))
    return out


# Studies --------------------------------------------------------------------------------------------------------------


def test_lines_of_every_study(full: Path) -> None:
    document = read(full)
    lines = document["lines"]
    assert [line["settings"]["max_tokens"] for line in of_study(lines, "tokens")] == [1000, "all"]
    assert [line["settings"]["kind"] for line in of_study(lines, "kinds")] == ["prose", "code", "maths", "languages", "all"]
    assert [line["settings"]["kind"] for line in of_study(lines, "shift")] == ["prose", "code", "both"]
    assert [line["settings"] for line in of_study(lines, "seeds")] == [{"seed": 0}, {"seed": 1}]
    assert len({line["texts"]["prose"]["kl"] for line in of_study(lines, "seeds")}) == 2, "the halves differ"
    for line in lines:
        assert line["seconds"] > 0 and line["tokens"] > 0 and list(line["texts"]) == ["prose", "code"]
        for cell in line["texts"].values():
            a, b = cell["kl_per_window"]
            assert cell["kl"] == pytest.approx((a + b) / 2) and cell["kl_se"] == pytest.approx(abs(a - b) / 2)
            assert 0 < cell["score"] <= cell["kl"], "the square of a mean root is below the mean"
    assert document["settings"] == {
        "model": "tiny", "dtype": "float32", "preset": "high", "context": CONTEXT, "windows": 2, "scored": SCORED,
        "texts": {"prose": "prose.txt", "code": "code.txt"},
    }  # fmt: skip
    assert str(full.parent) not in full.read_text(encoding="utf-8"), "no folder of this machine in the record"


@pytest.mark.parametrize("study", ["kinds", "shift"])
def test_kinds_have_equal_counts(full: Path, study: str) -> None:
    lines = of_study(read(full)["lines"], study)
    assert len({line["tokens"] for line in lines}) == 1
    assert len({line["texts"]["code"]["kl"] for line in lines}) == len(lines), "other texts, other codecs"


def test_fewer_tokens_are_used(full: Path) -> None:
    few, every = of_study(read(full)["lines"], "tokens")
    assert 500 < few["tokens"] <= 1000 < every["tokens"] and few["texts"]["prose"]["kl"] != every["texts"]["prose"]["kl"]


def test_lines_are_calibrated_on_their_texts(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of each line hold tokens of its kind's texts, or of its half of them, and no others."""
    monkeypatch.setattr(script, "calibrate", lambda bench, draw: draw())
    tokenizer, kinds = TinyTokenizer(), script.corpus()
    bench = script.Bench(model, tokenizer, {}, argparse.Namespace(halves=3), [])

    def triples(ids: list[int]) -> set[tuple[int, ...]]:
        return set(zip(ids, ids[1:], ids[2:], strict=False))

    def share_known(samples: Samples, texts: list[str]) -> float:
        known = set().union(*(triples(tokenizer(text)["input_ids"]) for text in texts))
        drawn = triples(torch.cat(samples.statistics, 1)[0].tolist())
        return len(drawn & known) / len(drawn)

    for study in ("kinds", "shift"):
        for settings, make in script.STUDIES[study](bench):
            own = kinds.get(settings["kind"], kinds["prose"] + kinds["code"])
            others = [text for text in kinds["all"] if text not in own] or ["nothing"]
            assert share_known(make(), own) > 0.95 and share_known(make(), others) < 0.3
    for settings, make in script.study_seeds(bench):
        half = random.Random(settings["seed"]).sample(kinds["all"], 32)
        assert share_known(make(), half) > 0.99 and share_known(make(), [t for t in kinds["all"] if t not in half]) < 0.3


def test_a_warning_of_few_tokens_is_recorded(full: Path, model: PreTrainedModel) -> None:
    samples = make_samples(TinyTokenizer(), None)
    bench = script.Bench(model, TinyTokenizer(), {}, None, [])
    few = script.calibrate(bench, lambda: Samples([samples.statistics[0][:, :100]], samples.held_out))
    assert few.columns["tokens"] == 92 and "few for head size 32" in few.columns["warnings"][0]
    assert not any("warnings" in line for line in read(full)["lines"])


def test_menu_lines_carry_the_certificate(full: Path, model: PreTrainedModel) -> None:
    """Every row of the certificate has its line; the chosen one is scored like the calibration itself."""
    lines = of_study(read(full)["lines"], "menu")
    engine = SpectralQuantEngine()
    rows = engine.calibrate(model, TinyTokenizer(), progress=False)["certificate"]["menu"]
    assert [line["settings"]["candidate"] for line in lines] == list(range(len(rows))) and {line["candidates"] for line in lines} == {len(rows)}
    assert [(line["changed"], line["kept"]) for line in lines] == [(row["changed"], row["kept"]) for row in rows]
    assert [line["menu_score"] for line in lines] == pytest.approx([row["score"] for row in rows], rel=1e-4)
    (chosen,) = (line for line in lines if line["chosen"])
    assert chosen is next(line for line in reversed(lines) if line["kept"])
    every = of_study(read(full)["lines"], "tokens")[-1]
    assert chosen["choices"] == every["choices"] and chosen["texts"]["prose"]["kl"] == pytest.approx(every["texts"]["prose"]["kl"], rel=1e-4)
    assert len({line["texts"]["prose"]["kl"] for line in lines}) > 3, "candidates differ on text"


@torch.no_grad()
def test_a_line_agrees_with_a_direct_computation(full: Path, model: PreTrainedModel, texts: dict[str, Path]) -> None:
    """The line of all tokens is `engine.calibrate`, scored with a cache that the model fills itself."""
    (line,) = (line for line in read(full)["lines"] if line["settings"] == {"max_tokens": "all"})
    tokenizer, engine = TinyTokenizer(), SpectralQuantEngine(compression="high")
    result = engine.calibrate(model, tokenizer, progress=False)
    assert result["tokens"] == line["tokens"] and result["certificate"]["kl"] == pytest.approx(line["certificate_kl"], rel=1e-4)
    for name, path in texts.items():
        expected = []
        for window in spread_windows(tokenise(tokenizer, path.read_text(encoding="utf-8")), CONTEXT + SCORED, 2, 0, name):
            ids = begin_with(leading_tokens(tokenizer), window)
            want = model(ids, use_cache=False).logits[0, CONTEXT:].log_softmax(-1)
            with engine.applied_to(model):
                cache = engine.cache(model)
                model.base_model(input_ids=ids[:, :CONTEXT], use_cache=True, **cache_argument(model, cache))
                pieces = [model(input_ids=p, use_cache=True, **cache_argument(model, cache)).logits[0] for p in ids[:, CONTEXT:].split(16, 1)]
            got = torch.cat(pieces).log_softmax(-1)
            expected.append(float(torch.nn.functional.kl_div(got, want, log_target=True, reduction="batchmean")))
        assert line["texts"][name]["kl_per_window"] == pytest.approx(expected, rel=1e-3)
        assert min(expected) > 1e-6, "codes were read"


def test_kinds_name_the_bundled_files() -> None:
    """Every word of KINDS is that of a file, and no file is of two kinds."""
    names = [p.name for p in (files("spectralquant") / "data" / "corpus").iterdir()]
    known = {re.split(r"[_.]", name)[1] for name in names}
    counts = Counter(word for words in script.KINDS.values() for word in words.split())
    assert set(counts) <= known and set(counts.values()) == {1}
    kinds = script.corpus()
    assert kinds["all"] == get_default_calibration_texts()
    assert [len(kinds[kind]) for kind in ("code", "maths", "languages")] == [16, 6, 12]
    assert any("def " in text for text in kinds["code"]) and not any("def " in text for text in kinds["prose"])


@pytest.mark.parametrize("count", [300, 1024, 1500, 2048])
@pytest.mark.parametrize("kind", ["prose", "maths", "all"])
def test_draw_exactly(count: int, kind: str) -> None:
    texts, tokenizer = script.corpus()[kind], TinyTokenizer()
    samples = script.draw_exactly(tokenizer, texts, count)
    assert samples.tokens == count and all(16 <= s.shape[1] <= 1024 for s in samples.statistics)
    assert samples.held_out and all(window.shape[1] >= 32 for window in samples.held_out)
    most = make_samples(tokenizer, texts, max_tokens=10**9).tokens
    assert script.draw_exactly(tokenizer, texts, most).tokens == most


# The file ---------------------------------------------------------------------------------------------------------------


def without_times(lines: Lines) -> Lines:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_a_complete_file_is_not_measured_again(full: Path, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = full.read_bytes()
    monkeypatch.setattr(script, "collect", lambda *a, **k: pytest.fail("calibrated again"))
    script.main(arguments(texts, full, *STUDIES))
    assert full.read_bytes() == before


def test_missing_lines_are_measured(full: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file without one half and one candidate, these two come back as they were."""
    document = read(full)
    missing = [line for line in document["lines"] if line["settings"] in ({"seed": 1}, {"candidate": 2})]
    kept = [line for line in document["lines"] if line not in missing]
    out = tmp_path / "result.json"
    out.write_text(json.dumps({**document, "lines": kept}), encoding="utf-8")
    scored, score = [], script.score
    monkeypatch.setattr(script, "score", lambda bench, profile: scored.append(profile) or score(bench, profile))
    script.main(arguments(texts, out, "seeds", "menu"))
    after = read(out)
    assert len(scored) == 2 and without_times(after["lines"]) == without_times([*kept, *missing])
    assert after["summary"] == document["summary"]


def test_an_interruption_keeps_finished_lines(texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calibrate, calls = tmp_path / "result.json", script.calibrate, []

    def interrupted(bench: Any, draw: Any) -> Any:
        calls.append(draw)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calibrate(bench, draw)

    monkeypatch.setattr(script, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(texts, out, "seeds"))
    assert [line["settings"] for line in read(out)["lines"]] == [{"seed": 0}]
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"], "nothing half-written is left"


def test_a_failed_calibration_leaves_a_line(texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens leave no window to hold out: that is recorded, the next line is measured, and neither is tried again."""
    out = tmp_path / "result.json"
    script.main(arguments(texts, out, "tokens", size=100))
    few, every = read(out)["lines"]
    assert list(few) == ["study", "settings", "error"] and few["settings"] == {"max_tokens": 100} and "too short" in few["error"]
    assert every["texts"]["prose"]["kl"] > 0 and list(read(out)["summary"]["tokens"]["prose"]) == ["all"]
    monkeypatch.setattr(script, "calibrate", lambda *a: pytest.fail("calibrated again"))
    script.main(arguments(texts, out, "tokens", size=100))


def test_lines_of_other_settings_are_refused(full: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copy(full, tmp_path))
    with pytest.raises(ConfigError, match=r"other settings \(context: 320\); choose another file"):
        script.main(arguments(texts, out, "seeds", context=256))
    with pytest.raises(ConfigError, match=r"other settings \(texts: .*prose\.txt"):
        script.main(arguments({"story": texts["prose"]}, out, "seeds"))


def test_model_is_asked_for_in_float32(full: Path, texts: dict[str, Path], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(script, "load_model", lambda *a: asked.append(a) or (model, TinyTokenizer(), "tiny"))
    script.main([*arguments(texts, full, "seeds"), "--model=some"])
    assert asked == [("some", "float32")]


def test_bad_arguments(texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.json"
    for argv, message in (
        ([f"--out={out}"], "nothing to do"),
        (["--text=prose", "--study=menu", f"--out={out}"], "prose: expected NAME=SOURCE"),
        (["--study=luck", f"--out={out}"], "invalid choice: 'luck'"),
    ):
        with pytest.raises(SystemExit):
            script.main(argv)
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="windows=1 is out of range"):
        script.main(arguments(texts, out, "seeds", windows=1))
    with pytest.raises(ConfigError, match="there is no such file"):
        script.main([*arguments({}, out, "seeds"), "--text=prose=nowhere.txt"])
    assert not out.exists()


def test_help_tells_what_each_study_shows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {study} +\w.{{40}}", shown, re.MULTILINE) for study in STUDIES)


# Report -----------------------------------------------------------------------------------------------------------------


def cell(*kl: float) -> dict[str, Any]:
    return {"kl": sum(kl) / len(kl), "kl_se": 0.1, "score": 0.1, "kl_per_window": list(kl)}


def line(study: str, settings: dict[str, Any], *kl: float, **columns: Any) -> dict[str, Any]:
    return {"study": study, "settings": settings, "tokens": 1000, **columns, "texts": {"prose": cell(*kl)}}


def test_summary_of_hand_made_lines() -> None:
    lines = [
        line("kinds", {"kind": "prose", "max_tokens": 9}, 1.0, 3.0),
        line("kinds", {"kind": "code", "max_tokens": 9}, 2.0, 6.0),
        {"study": "kinds", "settings": {"kind": "maths"}, "error": "too short"},
        line("seeds", {"seed": 0}, 1.0, 1.0),
        line("seeds", {"seed": 1}, 3.0, 3.0),
        line("menu", {"candidate": 0}, 1.0, 2.0, chosen=False),
        line("menu", {"candidate": 1}, 1.5, 2.1, chosen=True),
    ]
    found = report.summarise(lines)
    assert found["kinds"] == {"prose": {"prose": 1.0, "code": 2.0}}
    assert found["seeds"]["prose"] == pytest.approx({"halves": 2, "mean": 2.0, "standard_deviation": 2**0.5})
    assert found["menu"]["prose"] == pytest.approx(
        {"chosen": 1, "best": 0, "chosen_over_best": 1.2, "within_10_percent": False, "difference": 0.3, "difference_se": 0.2}
    )
    assert report.summarise([{"study": "tokens", "settings": {"max_tokens": 1}, "error": "too short"}]) == {}


def test_pictures_of_a_run(full: Path, tmp_path: Path) -> None:
    """--plot alone draws and loads no model."""
    image = pytest.importorskip("matplotlib.image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_model", lambda *a: pytest.fail("a model was loaded"))
        script.main([f"--out={full}", f"--plot={tmp_path / 'new'}"])
    paths = sorted((tmp_path / "new").iterdir())
    assert [p.name for p in paths] == sorted(f"calibration_{study}.png" for study in STUDIES)
    for path in paths:
        pixels = image.imread(path)[..., :3].min(-1)
        assert min(pixels.shape) > 500 and 0.001 < (pixels < 0.9).mean() < 0.8


def test_pictures_of_unfinished_studies(full: Path, tmp_path: Path) -> None:
    """One line of each study, a failed one, and no line of another."""
    pytest.importorskip("matplotlib")
    document = read(full)
    first = {line["study"]: line for line in reversed(deepcopy(document["lines"])) if line["study"] != "shift"}
    lines = [*first.values(), {"study": "shift", "settings": {"kind": "prose"}, "error": "too short"}]
    drawn = report.draw({**document, "lines": lines}, tmp_path)
    assert {path.name for path in drawn} == {f"calibration_{study}.png" for study in STUDIES if study != "shift"}
