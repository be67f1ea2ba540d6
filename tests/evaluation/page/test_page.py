"""The page of a run: what is on it, in which words, and that nothing on it is anybody's code."""

import builtins
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic
from hand_made import language_rows, needle_rows, write_bench, write_run

from spectralquant.errors import ConfigError
from spectralquant.evaluation.page import write_page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
MISSING = {
    "quality": "spectralquant evaluate MODEL --out",
    "memory": "spectralquant bench MODEL --out",
    "bits": "spectralquant calibrate MODEL --out",
}
"""Section -> the command that makes it."""


def full_run(folder: Path, **names: Any) -> Path:
    """An evaluation with needles, a bench and a calibration."""
    rows = [*language_rows(("prose", "code"), (512, 2048)), *needle_rows({"fp16": [(1024, 0.0)], "high": [(4096, 0.5)]})]
    write_bench(write_run(folder, rows, **names))
    synthetic.profile(layers=(0, 1, 3), decay=0.1).save(folder / "calibration.safetensors")
    return folder


class Elements(HTMLParser):
    """What a browser makes of a page, as far as tests ask: ids, tags, attributes, and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def read(path: Path) -> Elements:
    return Elements(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(full_run(tmp_path_factory.mktemp("page") / "run"))


def test_a_full_run_has_all_parts(whole: Path) -> None:
    page = read(whole)
    assert whole.name == "report.html"
    assert list(page.sections)[1:] == ["measured", "quality", "positions", "memory", "speed", "spectra", "bits", "tables"]
    pictures = [svg["aria-labelledby"] for svg in page.all("svg")]
    names = [
        "quality-512",
        "quality-2048",
        "positions-512",
        "positions-2048",
        "memory",
        "speed",
        "prompt",
        "spectra-key",
        "spectra-value",
        "bits-key",
        "bits-value",
    ]
    assert pictures == [f"{name}-title {name}-description" for name in names]
    assert "missing" not in {attributes.get("class") for attributes in page.all("p")}


def test_key_figures_and_words(whole: Path) -> None:
    page = read(whole)
    top = " ".join(page.sections[""].split())
    assert "high 6.40x smaller, 2.50 bits KL0.037 same token75.0 % whole at 1,0244.0x smaller decoding there1.10x as fast" in top
    assert "on prose and code behind 512 and 2,048 tokens of context, for 3 ways to keep a cache" in top and "Both behind 2,048 tokens" in top
    measured = " ".join(page.sections["measured"].split())
    for text in ("tiny, float32", "cpu, 2 threads", "torch 2.13.0", "spectralquant evaluate --out run", "spectralquant bench --out run", "3 rounds, 8 tokens"):
        assert text in measured
    assert "At 512 tokens high has a KL of 0.037 at 2.50 bits." in page.sections["quality"]
    assert "No other" not in page.sections["quality"] and "kivi2-g32 has" not in page.sections["quality"]  # it is larger and worse
    assert "prose, 512 tokens of context" in page.sections["tables"] and "Needles by depth" in page.sections["tables"]
    assert "constants" in page.sections["memory"] and "peak beside weights" not in page.sections["memory"]  # nothing counts memory on a processor
    assert "Preset high" not in page.sections["bits"] and "preset high" in page.sections["bits"]


def test_the_same_run_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    assert write_page(whole.parent, tmp_path / "again.html").read_bytes() == whole.read_bytes()


def test_ids_are_unique_and_references_lead_somewhere(whole: Path) -> None:
    page, text = read(whole), whole.read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a[k] for _, a in page.tags for k in ("href", "xlink:href") if (a.get(k) or "").startswith("#")}
    wanted |= {f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", text)}
    wanted |= {f"#{name}" for _, a in page.tags for name in (a.get("aria-labelledby") or "").split()}
    assert wanted <= {f"#{name}" for name in ids}


def test_nothing_is_loaded_and_nothing_runs(whole: Path) -> None:
    page, text = read(whole), whole.read_text(encoding="utf-8")
    assert not page.all("script") and not page.all("iframe") and not page.all("link")[1:] and "@import" not in text
    sources = [a.get(k) or "" for _, a in page.tags for k in ("src", "href", "xlink:href")]
    assert all(source == "" or source.startswith(("#", "data:")) for source in sources)
    assert any("default-src 'none'" in (a.get("content") or "") for a in page.all("meta"))


def test_pictures_take_the_page_s_colours_and_font(whole: Path) -> None:
    """Every colour outside the maps of bits is a variable that the style sheet defines for light and for dark."""
    text = whole.read_text(encoding="utf-8")
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    used, sheet = set(re.findall(r"var\(--([\w-]+)\)", pictures)), text.split("<style>")[1].split("</style>")[0]
    light, dark = sheet.split("@media (prefers-color-scheme: dark)")
    assert {"ink", "grid", "ours", "ours-text", "card", "series-0"} <= used
    assert all(f"--{name}: #" in light and f"--{name}: #" in dark for name in used)
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", pictures) and "font-family" not in pictures


@pytest.mark.parametrize("name", ["</title><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }} $\\frac{1}{0$ & <b>"])
def test_what_users_call_things_is_text(tmp_path: Path, name: str) -> None:
    """Names of models, texts and folders, and the command line: as text on the page, in pictures too, and never as markup."""
    rows = [{**row, "text": name} for row in language_rows()]
    folder = write_bench(write_run(tmp_path / "run & <i>", rows))
    for file in ("config.json", "bench.json"):
        document = json.loads((folder / file).read_text())
        document["plan"]["model"] = document["command"] = document["device"] = name
        (folder / file).write_text(json.dumps(document))
    page = read(write_page(folder))
    assert not page.all("script") and not page.all("img") and not page.all("b") and not page.all("i")
    assert name in page.sections[""] and name.split()[0] in page.sections["measured"] and f"{name}, 512 tokens of context" in page.sections["tables"]
    assert "spectralquant calibrate MODEL --out 'run & <i>/calibration.safetensors'" in page.sections["bits"]


def test_parts_that_are_missing_name_their_command(tmp_path: Path) -> None:
    alone = read(write_page(write_run(tmp_path / "a", language_rows())))
    for name in ("memory", "speed", "spectra", "bits"):
        assert f"{MISSING.get(name, 'spectralquant')}" in alone.sections[name]
    assert MISSING["quality"] not in alone.sections["quality"]
    bench = read(write_page(write_bench(tmp_path / "b")))
    for name in ("quality", "positions", "tables"):
        assert f"{MISSING['quality']} b" in bench.sections[name]
    assert "high 4.00x smaller, whole cache" in " ".join(bench.sections[""].split())
    assert len(bench.all("svg")) == 3


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = read(write_page(write_run(tmp_path, [])))
    assert "Nothing of tiny has been measured yet." in page.sections[""] and not page.all("svg")


def test_contexts_that_did_not_fit_are_named(tmp_path: Path) -> None:
    rows = [{"cache": "fp16", "context": 512, "out_of_memory": True}]
    page = read(write_page(write_bench(tmp_path, rows)))
    assert not page.all("svg") and "spectralquant bench MODEL" in page.sections["memory"]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has neither config\.json nor bench\.json: expected the folder of a run; make one with `spectralquant evaluate"):
        write_page(tmp_path)


def test_files_that_are_damaged(tmp_path: Path) -> None:
    folder = write_bench(tmp_path)
    (folder / "calibration.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"the calibration of the run can't be read.*remove the file"):
        write_page(folder)
    (folder / "bench.json").write_text("[")
    with pytest.raises(ConfigError, match=r"bench\.json is no JSON .*spectralquant bench MODEL --out"):
        write_page(folder)


def test_an_output_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out='.*missing/page\.html': there is no folder"):
        write_page(write_bench(tmp_path), tmp_path / "missing" / "page.html")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    folder = write_bench(tmp_path)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=rf'need.* {package}, which is not installed; run: pip install "spectralquant\[report\]"'):
        write_page(folder)
