"""Every code block of README, CONTRIBUTING and docs works. Python runs in the page's order, on a tiny model; so do commands of this package, in this process;
of other commands, which CI runs by itself, the tools, extras, files and sessions that they name exist. Of commands that start vLLM, which tests/serving does,
the options are checked. A block in any other language is an error."""

import ast
import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from blocks import PAGES, ROOT, Block, blocks, commands
from encoders import FAMILIES, build
from tiny_models import TinyTokenizer
from transformers import PreTrainedModel

from spectralquant import SpectralQuant, engine
from spectralquant.cli import models
from spectralquant.cli.main import main
from spectralquant.integrations.vllm.options import read_options
from spectralquant.integrations.vllm.plugin import NAME

TEXT = "text"
"""Language of output, which is shown and not run."""
NOT_RUN = {"docs/kernels.md": "load("}
"""Page -> what the one Python block says that needs a GPU: its imports and its syntax are checked; tests/kernels/test_compiler.py runs the same calls."""


QUICK = {
    "demo": {"--preset": "high", "--prompt": "word " * 300, "--max-new-tokens": "2"},
    "generate": {"--max-new-tokens": "2"},
    "chat": {"--max-new-tokens": "2"},
    "evaluate": {"--method": "high", "--windows": "1", "--scored": "32"},
    "sweep": {"--preset": "high", "--windows": "1"},
    "bench": {"--preset": "high", "--context": "300", "--new-tokens": "4"},
}
"""Options that a verb gets where the page leaves them to their defaults, which are for real models and patient people."""
FEWER = {"--max-new-tokens", "--windows", "--scored", "--new-tokens"}
"""Those that it gets whatever the page says."""
_done: set[tuple[str, ...]] = set()
"""Commands that ran: several pages begin with the same one."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where calibrations of all pages are kept: the model is the same."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def desk(llama: PreTrainedModel, tokenizer: TinyTokenizer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, where any model's name gives the tiny one; it is clean again afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECTRALQUANT_HOME", str(home))
    monkeypatch.setattr(engine, "token_budget", lambda _: 4000)  # a calibration of a second
    monkeypatch.setattr(tokenizer, "chat_template", "words", raising=False)
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda _: None, raising=False)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **_: llama)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **_: tokenizer)
    monkeypatch.setattr(models, "load_model", lambda *_: (llama, tokenizer, "tiny"))
    monkeypatch.setattr(models, "load_shape", lambda _: (llama, "tiny"))
    before = llama.config._attn_implementation
    yield tmp_path
    llama.__dict__.pop("generate", None)
    llama.__dict__.pop("_spectralquant", None)
    llama.set_attn_implementation(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_page(page: Path, desk: Path, llama: PreTrainedModel, llama_calibration: Path, tokenizer: TinyTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sq = SpectralQuant(compression="high")
    sq.load_calibration(llama_calibration)
    names = {"model": llama, "tokenizer": tokenizer, "sq": sq, "document": "word " * 300, "questions": ["what is it", "why is it"], **_page_names(page.name)}
    for block in blocks(page):
        if block.language == "python":
            _run_python(block, names)
        elif block.language == "bash":
            for command in commands(block):
                _prepare(command, llama_calibration)
                _run_command(block, shlex.split(command), monkeypatch)
        else:
            assert block.language == TEXT, f"{block.place}: no check for a block in {block.language!r}; use python, bash, or text for output"


@pytest.mark.real
def test_output_of_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page shows is what its command prints."""
    page = blocks(ROOT / "docs" / "cli.md")
    command, output = next((a, b) for a, b in pairwise(page) if b.language == TEXT and a.code.startswith("spectralquant plan"))
    monkeypatch.setenv("COLUMNS", "120")
    assert main(shlex.split(command.code)[1:]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(line.split() in printed for line in output.code.splitlines())


def _page_names(page: str) -> dict[str, Any]:
    """What a page speaks of beside a language model."""
    if page != "encoders.md":
        return {}
    inputs = FAMILIES["ViT"][1]
    return {"model": build("ViT"), "batches": [inputs()], "batch": inputs()}


def _run_python(block: Block, names: dict[str, Any]) -> None:
    tree = ast.parse(block.code, block.place)
    if block.page in NOT_RUN and NOT_RUN[block.page] in block.code:
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), block.place
        return
    _prepare(block.code, None)
    try:
        exec(compile(tree, block.place, "exec"), names)  # our own page
    except Exception as error:
        raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error


def _prepare(code: str, calibration: Path | None) -> None:
    """Texts and calibrations that the code names are there."""
    for name in re.findall(r"[\w./-]+\.txt\b", code):
        Path(name).write_text("".join(f"The {i} times table says that {i} times {i} is {i * i}.\n" for i in range(400)), encoding="utf-8")
    for name in re.findall(r"(?:inspect|--calibration) ([\w./-]+\.safetensors)", code):
        if calibration is not None:
            shutil.copy(calibration, name)


def _run_command(block: Block, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tool, place = words[0], f"{block.place}: {shlex.join(words)}"
    check = {"spectralquant": _ours, "pip": _pip, "python": _python, "nox": _nox, "vllm": _vllm, "ray": _ray, "curl": _curl}.get(tool, _tool)
    check(words, place, monkeypatch)


def _ours(words: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--install-completion" in words:  # would write to the reader's shell
        return
    monkeypatch.setattr(sys, "stdin", StringIO("hello there\n/stats\n/exit\n"))
    arguments = words[1 : words.index(">")] if ">" in words else words[1:]
    for option, value in QUICK.get(words[1], {}).items():
        if option not in words or option in FEWER:
            arguments += [option, value]
    if words[1] == "evaluate" and "list" in words:
        arguments = words[1:]
    if tuple(arguments) not in _done:
        assert main(arguments) == 0, place
        _done.add(tuple(arguments))


def _pip(words: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras that are installed are in pyproject.toml."""
    assert words[1] == "install", place
    known = set(
        re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
    )
    for target in words[2:]:
        asked = re.fullmatch(r"(?:\.|spectralquant)(?:\[(.*)\])?", target)
        assert target.startswith("-") or asked, f"{place}: {target} is not this package"
        assert not asked or set((asked[1] or "").split(",")) - {""} <= known, place


def _python(words: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts and modules are there, and take the options that they are given."""
    if words[1] == "-m" and words[2].startswith("vllm."):
        _vllm(words, place, monkeypatch)
        return
    if words[1] == "-m":
        source = find_spec(words[2])
        assert source is not None, place
        return
    script = ROOT / words[1]
    assert script.is_file(), place
    text = script.read_text(encoding="utf-8")
    for word in words[2:]:
        assert not word.startswith("--") or f'"{word.split("=")[0]}"' in text, f"{place}: {word} is no option of it"


def _nox(words: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [word.split("(")[0] for flag, word in pairwise(words) if flag == "-s"]
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert all(f"def {session}(" in text for session in sessions), place


def _vllm(words: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has our backend, by its name, with options that it takes."""
    assert words[:2] == ["vllm", "serve"] or words[1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model"], place
    said = dict(pairwise(words))
    assert said.get("--attention-backend", NAME) == NAME, place
    assert read_options(json.loads(said["--additional-config"])) is not None, place


def _ray(words: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[1] == "start" and len(words) == 3, place
    assert re.fullmatch(r"--head|--address=[\w.-]+:\d+", words[2]), place


def _curl(words: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that OpenAI's interface knows."""
    said = dict(pairwise(words))
    assert re.fullmatch(r"http://localhost:8000/v1/completions", words[1]), place
    assert json.loads(said["-d"]).keys() >= {"model", "prompt"}, place


def _tool(words: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools of the extra `dev`, and scripts of the repository; files that they are given are there."""
    tools: dict[str, Callable[[], bool]] = dict.fromkeys(("pytest", "ruff", "lint-imports", "pyright", "mkdocs"), lambda: True)
    assert words[0] in tools or (ROOT / words[0]).is_file(), f"{place}: no check for this command"
    for word in words[1:]:
        assert "/" not in word or (ROOT / word.split("::")[0]).exists(), f"{place}: {word} is not there"
