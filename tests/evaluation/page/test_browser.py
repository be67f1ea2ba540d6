"""The page in a browser, headless: light and dark, on a phone and on a desk."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
from hand_made import language_rows, write_bench, write_run

from spectralquant.evaluation.page import write_page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
image = pytest.importorskip("PIL.Image")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path; install it, on Debian: apt install chromium")
SIZES = ((390, 844), (1280, 900))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the page of a full run with a long name, a long command and many layers."""
    folder = write_bench(write_run(tmp_path_factory.mktemp("browser") / "run", language_rows(("prose", "code"), (512, 2048))))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tiny"', '"organisation/a-model-whose-name-has-no-end-135M-instruct-v2.5-gguf-q8_0"'))
    config.write_text(config.read_text().replace("evaluate --out run", f"evaluate --out run --text {'x' * 200}"))
    synthetic.profile(layers=tuple(range(14)), decay=0.1).save(folder / "calibration.safetensors")
    return write_page(folder).as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=["phone", "desk"])
def test_in_a_browser(browser: Any, address: str, scheme: str, size: tuple[int, int], tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [address]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = page.eval_on_selector_all("svg, svg image", "all => all.map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height])")
    assert len(boxes) >= 11 and all(width > 30 and height > 5 for width, height in boxes)
    sizes = page.eval_on_selector_all("svg text", "all => all.map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)")
    turned = [size for size in sizes if size > 1]  # text on its side has no width in x
    assert min(turned) > 7.5 and len(turned) > 100
    bright = _brightness(page, "body", "backgroundColor")
    assert bright > 220 if scheme == "light" else bright < 60
    ink = _brightness(page, "#quality svg text", "fill")
    assert ink < 140 if scheme == "light" else ink > 120
    shot = page.screenshot(path=tmp_path / f"{scheme}-{size[0]}.png")
    shown = image.open(io.BytesIO(shot))
    assert shown.size == size and len(shown.convert("L").getcolors(1 << 16)) > 20
    page.close()


def _brightness(page: Any, selector: str, name: str) -> float:
    """Mean of red, green and blue, 0 to 255, of the first element."""
    colour = page.eval_on_selector(selector, f"e => getComputedStyle(e).{name}")
    return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")) / 3


def test_tables_scroll_inside_their_box_on_a_phone(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    inside = page.eval_on_selector_all("#tables .scroll", "all => all.map(e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === 'auto')")
    assert inside and all(inside)
    page.close()
