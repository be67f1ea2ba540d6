"""What the README and the migration page tell people to type works."""

import json
import re
import shlex
from importlib.metadata import metadata
from pathlib import Path
from statistics import mean

import pytest
import transformers
from encoders import FAMILIES, build
from tiny_models import TinyTokenizer
from transformers import PreTrainedModel

from spectralquant.cli.main import build_parser

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/migration.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page: str, llama: PreTrainedModel, tokenizer: TinyTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: llama)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    names = {"document": "word " * 300, "questions": ["what ", "why "], "model": llama, "tokenizer": tokenizer}
    before = llama.config._attn_implementation
    try:
        code = blocks(page, "python")
        assert code
        for block in code:
            exec(compile(block, page, "exec"), names)  # our own page
    finally:
        llama.__dict__.pop("generate", None)
        llama.__dict__.pop("_spectralquant", None)
        llama.set_attn_implementation(before)


def test_the_page_of_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs, and its figures are those of the result file."""
    page, (inputs, model) = "docs/encoders.md", (FAMILIES["ViT"][1], build("ViT"))
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "batches": [inputs()], "batch": inputs()}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)  # our own page
    assert names["output"].logits.shape == (3, 2) and (tmp_path / "my-encoder.safetensors").is_file()
    rows = json.loads((ROOT / "benchmarks/results/encoder-memory-cpu.json").read_text(encoding="utf-8"))["rows"]
    text = (ROOT / page).read_text(encoding="utf-8")
    for row, label in zip((rows[0], rows[1], rows[3]), ("logits in full", "`scaled_dot_product_attention`", "coded, `high`"), strict=True):
        assert f"| {label} | {row['peak_bytes'] / 1e6:,.0f} MB | {row['held_bytes'] / 1e6:.1f} MB |" in text
    trained = json.loads((ROOT / "benchmarks/results/encoders-cpu.json").read_text(encoding="utf-8"))
    labels = {"standard": "`standard`", "high": "`high`, `max`", "8 bits": "8 bits"}
    for row in trained["summary"]:
        same = "high" if row["setting"] == "max" else row["setting"]  # the page says that they are
        assert row["seeds"] == 5
        low, high = (f"{100 * row['accuracy_difference'][end]:.2f}".replace("-0.00", "0.00") for end in ("low", "high"))
        accuracy, figures = f"{100 * row['accuracy_uncoded']['mean']:.1f} %", f"{row['cosine']['mean']:.4f} | {row['kl']['mean']:.5f} |"
        assert re.search(rf"\| {re.escape(labels[same])} \| {accuracy} \| \S+ \({low} to {high}\) \| {re.escape(figures)}", text)
    differences = [end for claim in trained["claims"] for end in claim["accuracy_difference"].values()]
    assert not any(d["low"] > 0 for d in differences), "the page says that nothing improves"


@pytest.mark.parametrize("page", [*PAGES, "docs/evaluation.md", "docs/encoders.md"])
def test_shell_commands_exist(page: str) -> None:
    """Extras that are installed are in pyproject.toml, sub-commands parse, scripts are there."""
    extras = set(metadata("spectralquant").get_all("Provides-Extra") or ())
    for block in blocks(page, "bash"):
        for command in re.split(r"\n|&&", block):
            words = shlex.split(command, comments=True)
            if not words or words[0] == "pytest":
                continue
            if words[:2] == ["pip", "install"]:
                assert set(re.findall(r"\[(.*?)\]", command)) <= extras
            elif words[0] == "spectralquant":
                build_parser().parse_args(words[1:])
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file()
            else:
                assert (ROOT / words[0]).is_file()


@pytest.mark.parametrize(
    ("model", "file", "texts", "methods"),
    [("SmolLM2-135M-Instruct", "evaluation-smollm2-1024", 3, 20), ("Qwen2.5-Coder-1.5B-Instruct", "evaluation-qwen-2048", 3, 13)],
)
def test_figures_of_quality_are_those_of_the_result_file(model: str, file: str, texts: int, methods: int) -> None:
    """Every line of a quality table, as rounded there."""
    report = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8"))
    labels = {m["label"]: m["name"] for m in report["methods"]}
    figures = {(line["text"], line["method"]): line for line in report["language"]}
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(f"**{model}**")[1].split("\n\n")[1]
    rows = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in section.splitlines()]
    names = [name.removeprefix("KL, ") for name in rows[0] if name.startswith("KL, ")]
    assert (len(names), len(rows)) == (texts, methods + 2)
    for label, bits, *kl, agree, ratio in rows[2:]:
        lines = [figures[text, labels[label]] for text in names]
        assert kl == [f"{line['kl']:.4f}" for line in lines]
        assert bits == f"{mean(line['bits'] for line in lines):.2f}"
        assert agree == f"{mean(line['agreement'] for line in lines):.1%}".replace("%", " %")
        assert ratio == f"{mean(line['perplexity_ratio'] for line in lines):.3f}"
