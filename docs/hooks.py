"""What MkDocs needs beyond mkdocs.yml: pages and result files from outside docs/, links to them, and formulas as MathML.

Pages link to files of the repository, so that they can be read there; on the site the same links lead to the copies that it has.
"""

import html
import json
import re
from pathlib import Path
from posixpath import relpath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ELSEWHERE = {name.lower(): ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}
"""Page of the site -> the file that it is."""
AS_ON_SITE = {ROOT / "README.md": "index.md", RESULTS: "results.md", **{source: page for page, source in ELSEWHERE.items()}}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
WRITTEN_OTHERWISE = {
    r"\\[bB]ig(?=\s*\\[lr](?:angle|floor))": "",
    r"\\_": "_",
    r"\\math(bb|cal) ([A-Z])": r"\\math\1{\2}",
    r"\\[lr]vert": "|",
}
"""What the converter doesn't know, or draws badly, and the same in its words."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is written elsewhere in the repository."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=source.read_text(encoding="utf-8")))
    found = sorted(RESULTS.glob("*.json"))
    for source in found:
        files.append(File.generated(config, f"benchmarks/results/{source.name}", abs_src_path=str(source)))
    files.append(File.generated(config, "results.md", content=_table_of_results(found)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right in the repository into links that are right on the site."""
    name = page.file.src_uri
    source = ELSEWHERE.get(name, ROOT / "docs" / name)
    if name == "results.md":
        return markdown
    return LINK.sub(lambda link: link[1] + _on_site(link[2], source, name) + (link[3] or "") + link[4], markdown)


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    return FORMULA.sub(lambda found: _formula(html.unescape(found[2]), block=found[1] == "div"), html_text)


def _on_site(target: str, source: Path, page: str) -> str:
    path = (source.parent / target).resolve()
    if path in AS_ON_SITE:
        place = AS_ON_SITE[path]
    elif path.is_relative_to(ROOT / "docs"):
        place = path.relative_to(ROOT / "docs").as_posix()
    elif path.parent == RESULTS and path.is_file():
        place = path.relative_to(ROOT).as_posix()
    else:
        raise PluginError(f"{source.name} links to {target}, which is not on the site; name it without a link")
    return relpath(place, Path(page).parent.as_posix())


def _formula(text: str, block: bool) -> str:
    for written, known in WRITTEN_OTHERWISE.items():
        text = re.sub(written, known, text)
    drawn = convert(text, display="block" if block else "inline")
    if "\\" in re.sub(r"<[^>]*>", "", drawn):
        raise PluginError(f"a part of this formula is unknown: {text}")
    return f'<div class="formula">{drawn}</div>' if block else drawn


def _table_of_results(found: list[Path]) -> str:
    rows = [f"| [{source.name}](benchmarks/results/{source.name}) | {_machine(source)} |" for source in found]
    said = "Figures of these pages come from these files, each with the command and the versions that gave it."
    head = f"# Result files\n\n{said} What a page calls a one-off, and most of the log, has none.\n"
    return "\n".join([head, "| file | measured on |", "|---|---|", *rows, ""])


def _machine(source: Path) -> str:
    content = json.loads(source.read_text(encoding="utf-8"))
    machine = content.get("config", {}).get("machine") or content.get("machine") or content.get("device") or content.get("card") or content.get("cpu") or ""
    return str(machine.get("device") or machine.get("cpu") or machine) if isinstance(machine, dict) else str(machine)
