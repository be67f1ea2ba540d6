"""What the README and the migration page tell people to type works."""

import re
import shlex
from importlib.metadata import metadata
from pathlib import Path

import pytest
import transformers
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
        llama.__dict__.pop("_spectralquant_before", None)
        llama.set_attn_implementation(before)


@pytest.mark.parametrize("page", [*PAGES, "docs/evaluation.md"])
def test_shell_commands_exist(page: str) -> None:
    """Extras that are installed are in pyproject.toml, sub-commands parse, scripts are there."""
    extras = set(metadata("spectralquant").get_all("Provides-Extra") or ())
    for block in blocks(page, "bash"):
        for command in re.split(r"\n|&&", block):
            words = shlex.split(command, comments=True)
            if not words or words == ["pytest"]:
                continue
            if words[:2] == ["pip", "install"]:
                assert set(re.findall(r"\[(.*?)\]", command)) <= extras
            elif words[0] == "spectralquant":
                build_parser().parse_args(words[1:])
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file()
            else:
                assert (ROOT / words[0]).is_file()
