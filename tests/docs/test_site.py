"""The documentation site builds strictly, its links lead somewhere, and a page that is opened fetches nothing from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from blocks import ROOT

mkdocs = pytest.importorskip("mkdocs.commands.build", reason="the site needs the extra docs")
pytest.importorskip("material", reason="the site needs the extra docs")
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
"""Elements that load something when a page is opened."""


class Page(HTMLParser):
    """Links, what is fetched, and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {str(found[name]) for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag in FETCHED and found.get(FETCHED[tag]) and found.get("rel") != "canonical":
            self.fetched.append(str(found[FETCHED[tag]]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs.build(config)
    config.plugins.on_shutdown()
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(found) > 20
    return found


def test_links_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    lost = []
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            target, anchor = urldefrag(unquote(link))
            if re.match(r"[a-z]+:", target):
                continue
            file = (path.parent / target).resolve() if target else path
            if path.name == "404.html":  # its links begin at the site's root
                file = site / target.lstrip("/")
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors | {"__skip"}):
                lost.append(f"{path.name}: {link}")
    assert not lost


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    away = [f"{path.name}: {source}" for path, page in pages.items() for source in page.fetched if re.match(r"([a-z]+:)?//", source)]
    away += [
        f"{path.name}: {m}" for path in site.rglob("*.css") for m in re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)'\"]*", path.read_text("utf-8"))
    ]
    assert not away


def test_formulas_are_drawn(pages: dict[Path, Page], site: Path) -> None:
    text = (site / "maths.html").read_text(encoding="utf-8")
    assert text.count("<math") > 150 and "arithmatex" not in text and "\\frac" not in re.sub(r"<pre.*?</pre>|<code.*?</code>", "", text, flags=re.DOTALL)
