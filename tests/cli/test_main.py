"""The command line as a user meets it: what verbs print, their JSON, exit statuses, and one line for everything that is wrong."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from spectralquant import SpectralQuantEngine
from spectralquant.cli import main as cli
from spectralquant.cli.main import main
from spectralquant.presets import PRESETS
from spectralquant.version import __version__

VERBS = ("demo", "generate", "chat", "calibrate", "inspect", "evaluate", "sweep", "bench", "report", "presets", "plan", "doctor")


def document(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict:
    """What a verb prints with --json: one document and nothing else."""
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_json(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f" spectralquant {verb}" in shown and "--json" in shown


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {verb} " in shown for verb in VERBS) and "--install-completion" in shown


def test_version_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"spectralquant {__version__}\n"
    assert main([]) == 2 and "Usage" in capsys.readouterr().out


def test_completion_of_presets() -> None:
    """As the shell asks for it."""
    from spectralquant.cli.options import _complete_preset

    assert [name for name, _ in _complete_preset("")] == list(PRESETS) and [name for name, _ in _complete_preset("u")] == ["ultra"]


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(document(capsys, "presets")) == {"standard", "high", "max", "ultra"}
    assert main(["presets"]) == 0 and "6.55x" in capsys.readouterr().out


def test_calibrate_inspect_generate(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], calibrations: Path) -> None:
    """The way of a new user: the calibration is made once and found again, beside the model too."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    text = tmp_path / "own.txt"
    text.write_text("One token is one character here. " * 60)
    made = document(capsys, "calibrate", str(folder), "--text", str(text), "--out", str(folder / "spectralquant"))
    assert made["loaded_from"] is None and made["n_heads"] == 6 and made["written_to"] == str(folder / "spectralquant")
    again = document(capsys, "calibrate", str(folder), "--text", str(text), "--out", str(tmp_path / "one.safetensors"))
    assert Path(again["loaded_from"]).parent == calibrations and again["certificate"] == made["certificate"]
    assert document(capsys, "calibrate", str(folder), "--text", str(text), "--no-cache")["loaded_from"] is None
    assert document(capsys, "inspect", str(folder)) == document(capsys, "inspect", str(tmp_path / "one.safetensors"))
    kept = len(list(calibrations.iterdir()))
    answer = document(capsys, "generate", str(folder), "Say something. " * 30, "--max-new-tokens", "4")
    assert answer["stats"]["new_tokens"] == 4 and answer["stats"]["ratio"] > 0 and len(list(calibrations.iterdir())) == kept


def test_inspect_shows_spectra_and_bits(llama_calibration: Path, engine: SpectralQuantEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama_calibration)]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM: 3 coded layers, 2 KV heads of size 32" in shown and "certificate" in shown and "█" in shown
    heads = document(capsys, "inspect", str(llama_calibration), "--preset", "standard")["heads"]
    assert len(heads) == 3 * 2 * 2
    for head in heads:
        assert sum(head["widths"].values()) == len(head["variance"]) == 32
        assert head["bits"] == pytest.approx(sum(int(width) * count for width, count in head["widths"].items()) / 32)
        share = sum(head["variance"][: head["d_eff"]]) / sum(head["variance"])
        assert share >= PRESETS["standard"].d_eff_variance > sum(head["variance"][: head["d_eff"] - 1]) / sum(head["variance"])


def test_generate_streams_the_answer_alone(model_folder: str, llama_calibration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stdout holds what the model says, as the JSON has it; all else is on stderr. The same seed samples the same."""
    arguments = ["generate", model_folder, "Hello there", "--calibration", str(llama_calibration), "--max-new-tokens", "6", "--temperature", "0.9"]
    text = document(capsys, *arguments)["text"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == text.strip() and "tokens/s" in captured.err


def test_generate_reads_standard_input(model_folder: str, llama_calibration: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--calibration", str(llama_calibration), "--max-new-tokens", "4", "--no-chat"]
    typed = document(capsys, "generate", model_folder, "from a pipe", *arguments)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert document(capsys, "generate", model_folder, "-", *arguments)["tokens"] == typed["tokens"]


def test_chat_remembers(model_folder: str, llama_calibration: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/stats\n/nonsense\nagain\n/reset\n/stats\n/exit\nnever said\n"))
    assert main(["chat", model_folder, "--calibration", str(llama_calibration), "--max-new-tokens", "3", "--json"]) == 0
    captured = capsys.readouterr()
    first, stats, second, empty = map(json.loads, captured.out.splitlines())
    assert (first["turns"], stats["turns"], second["turns"], empty["turns"]) == (1, 1, 2, 0)
    assert second["seq_len"] > stats["seq_len"] == first["seq_len"] > empty["seq_len"] == 0
    assert second["read_tokens"] < second["seq_len"] - first["seq_len"] + 8, "the first turn went through the model again"
    assert "/stats" in captured.err  # help, for what is no command


def test_chat_prints_answers(model_folder: str, llama_calibration: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/stats\n"))
    assert main(["chat", model_folder, "--calibration", str(llama_calibration), "--max-new-tokens", "3"]) == 0
    assert "1 turns at 'high'" in capsys.readouterr().out


def test_demo(model_folder: str, llama_calibration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", model_folder, "--preset", "high", "--prompt", "Say hello. " * 60, "--max-new-tokens", "4", "--calibration", str(llama_calibration)]
    runs = document(capsys, *arguments)["runs"]
    assert [r["method"] for r in runs] == ["FP16", "high"]
    assert runs[1]["cache_bytes"] < runs[0]["cache_bytes"] and runs[1]["kl"] >= 0 and runs[0]["kl"] == 0 and runs[0]["agreement"] == 1
    assert runs[1]["ratio"] == runs[1]["fp16_bytes"] / runs[1]["cache_bytes"]
    assert main(arguments) == 0 and "Summary" in capsys.readouterr().out


def test_bench_and_report(model_folder: str, llama_calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--context", "300", "--preset", "high", "--new-tokens", "2", "--repeats", "1", "--calibration", str(llama_calibration), "--out", str(run)]
    found = document(capsys, "bench", model_folder, *options)
    assert [(r["cache"], r["context"]) for r in found["rows"]] == [("fp16", 300), ("high", 300)]
    assert json.loads((run / "bench.json").read_text())["rows"] == found["rows"]
    page = document(capsys, "report", str(run))
    assert page["page"] == str(run / "report.html") and page["bytes"] == (run / "report.html").stat().st_size > 10_000
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0 and "written to" in capsys.readouterr().out
    assert main(["bench", model_folder, *options]) == 0 and "tok/s" in capsys.readouterr().out


def test_sweep(model_folder: str, llama_calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Line {i} of {i * i}.\n" for i in range(100)))
    arguments = ["sweep", model_folder, "--calibration", str(llama_calibration), "--context", "200", "--windows", "1", "--text", f"squares={book}"]
    found = document(capsys, *arguments, "--preset", "high", "--preset", "ultra", "--target-kl", "1e9", "--plot", str(tmp_path / "new" / "sweep.png"))
    assert [p["bits"] for p in found["points"]] == sorted(p["bits"] for p in found["points"]) and found["sweet_spot"] == found["points"][0]["name"]
    assert (tmp_path / "new" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--preset", "ultra", "--target-kl", "1e-30"]) == 1
    assert "no setting has KL <= 1e-30" in capsys.readouterr().out


def test_plan(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "plan", model_folder, "--batch", "2", "--context", "2000", "--memory", "1GB")
    assert [f["method"] for f in found["fits"]] == ["FP16", *PRESETS] and all(f["fits"] for f in found["fits"])
    assert found["fits"][2]["ratio"] > 3 and found["fits"][2]["most_context"] > found["fits"][0]["most_context"]
    assert not any(f["fits"] for f in document(capsys, "plan", model_folder, "--memory", "1MB", status=1)["fits"])
    assert document(capsys, "plan", model_folder)["fits"][0]["fits"] is None
    assert main(["plan", model_folder, "--context", "100000"]) == 0 and "made for 4,096 tokens" in capsys.readouterr().out


WRONG = [
    (["demo", "--max-new-tokens", "0"], "--max-new-tokens=0 is out of range"),
    (["demo", "nowhere.gguf"], "MODEL nowhere.gguf: there is no such file"),
    (["demo", "--preset", "tiny"], "'tiny' is no preset; choose one of 'standard'"),
    (["demo", "--calibration", "nowhere"], "--calibration nowhere: there is no such file; make one with: spectralquant calibrate"),
    (["calibrate", "EMPTY"], "the folder holds no config.json"),
    (["calibrate", "MODEL", "--text", "nowhere.txt"], "--text nowhere.txt: No such file"),
    (["calibrate", "MODEL", "--text", "BINARY"], "is not UTF-8"),
    (["calibrate", "MODEL", "--samples", "0"], "n_samples=0 is out of range"),
    (["calibrate", "MODEL", "--text", "SHORT"], "too short: at least 256 are needed"),
    (["calibrate", "MODEL", "--dtype", "int8"], "--dtype int8: expected one of float32"),
    (["inspect", "nowhere"], "calibration file nowhere.safetensors does not exist"),
    (["inspect", "BINARY"], "does not exist"),
    (["inspect", "BROKEN"], "truncated or damaged"),
    (["generate", "MODEL", " "], "PROMPT is empty"),
    (["generate", "MODEL", "x", "--temperature=-1"], "temperature=-1.0: expected 0 or more"),
    (["generate", "MODEL", "x", "--top-p", "0"], "top_p=0.0: expected a share"),
    (["generate", "OTHER", "x", "--calibration", "CALIBRATION"], "made for another model"),
    (["chat", "MODEL", "--max-new-tokens", "0"], "--max-new-tokens=0"),
    (["evaluate"], "--out is missing"),
    (["sweep", "--target-kl", "0"], "--target-kl 0.0: expected a positive number"),
    (["sweep", "--windows", "0"], "windows=0 is out of range"),
    (["bench", "MODEL", "--context", "0"], "contexts=0 is out of range"),
    (["bench", "MODEL", "--calibration", "CALIBRATION", "--context", "100000"], "100"),
    (["report", "EMPTY"], "spectralquant evaluate"),
    (["report", "nowhere"], "nowhere"),
    (["plan", "MODEL", "--batch", "0"], "--batch=0 is out of range"),
    (["plan", "MODEL", "--memory", "much"], "--memory='much': expected a positive number of bytes"),
    (["plan", "MODEL", "--dtype", "int4"], "--dtype int4: expected one of"),
]


@pytest.mark.parametrize(("arguments", "text"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_is_one_line(
    arguments: list[str], text: str, model_folder: str, llama_calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, the argument, what was expected; no traceback, and nothing on stdout."""
    files = {"EMPTY": tmp_path / "empty", "BINARY": tmp_path / "binary", "SHORT": tmp_path / "short", "BROKEN": tmp_path / "broken.safetensors"}
    files["EMPTY"].mkdir()
    files["BINARY"].write_bytes(b"\xff\xfe")
    files["SHORT"].write_text("a few words")
    files["BROKEN"].write_bytes(b"broken")
    if "OTHER" in arguments:
        from tiny_models import save_tiny_model

        save_tiny_model(tmp_path / "other", "qwen3")
    places = {**files, "MODEL": model_folder, "CALIBRATION": llama_calibration, "OTHER": tmp_path / "other"}
    assert main([str(places.get(argument, argument)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("spectralquant: ")]
    assert len(errors) == 1 and text in errors[0] and "Traceback" not in captured.err
    assert not [line for line in captured.out.splitlines() if not line.startswith(("model: ", "calibration: "))]


@pytest.mark.parametrize("arguments", [["nonsense"], ["presets", "--nonsense"], ["generate"], ["bench", "--context", "many"]], ids=" ".join)
def test_wrong_grammar(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2 and "Usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [(KeyboardInterrupt(), 130, "interrupted"), (PermissionError(13, "Permission denied", "/somewhere"), 1, "/somewhere: Permission denied")],
    ids=["interrupt", "file"],
)
def test_what_is_no_fault_of_ours(error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert main(["presets"]) == status and capsys.readouterr().err == f"spectralquant: {text}\n"


def test_faults_of_ours_show_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        main(["presets"])
