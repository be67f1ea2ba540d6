"""Code blocks of the pages: where they are, and what a reader has at hand on each page."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. `line`: where it begins on its page; `language`: the word behind the fence."""

    page: str
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All of them, in order; code without the indentation of its fence."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    found = list(_FENCE.finditer(text))
    fences = len(re.findall(r"^ *```", text, re.MULTILINE))
    assert fences == 2 * len(found), f"{name}: {fences} fences make no whole blocks"
    return [
        Block(name, text.count("\n", 0, m.start()) + 1, m[2].strip(), "".join(line.removeprefix(m[1]) for line in m[3].splitlines(keepends=True)))
        for m in found
    ]


def commands(block: Block) -> list[str]:
    """Its commands, one by one: lines that end in a backslash go on, `&&` joins two, what is behind # is said to the reader."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [command.strip() for line in lines for command in re.split(r"&&", re.sub(r"(^|\s)#.*", "", line)) if command.strip()]
