"""A figure of matplotlib as SVG inside a page: it takes the page's font, and its colours are variables, so that one picture serves light and dark."""

import html
import io
import re
from typing import Any

from spectralquant.evaluation.plots.style import COLOURS, GREY, OUR_COLOUR, SETTINGS, TAIL, text_colour

INK = {"#000000": "ink", "#222222": "ink", "#444444": "muted", GREY.lower(): "muted"}
LINES = {"#e6e6e6": "grid", "#999999": "axis", "#ffffff": "card", TAIL.lower(): "tail"}
_NUMBERS = re.compile(r' (?:d|x|y|width|height|transform)="[^"]*"')
"""Attributes whose numbers matplotlib writes to a millionth of a point."""
_REFERENCE = re.compile(r'(?:url\(#|href="#)([^)"]+)')


def series_names() -> dict[str, str]:
    """Colour of a family of methods -> the name of its variable."""
    return {OUR_COLOUR: "ours", **{colour: f"series-{i}" for i, colour in enumerate(COLOURS)}}


def inline_svg(figure: Any, name: str, title: str, description: str) -> str:
    """`figure` as an <svg> element, the same text for the same figure.

    Args:
        name: Unique in the page; ids inside begin with it.
        title, description: What the picture is, and what it shows, for those who don't see it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**SETTINGS, "svg.fonttype": "none", "svg.hashsalt": name}):  # pyright: ignore
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
    drawn = buffer.getvalue()
    drawn = _themed(_own_ids(drawn[drawn.index("<svg") :], name))
    size = re.search(r'viewBox="([^"]+)"', drawn)
    assert size is not None
    opening = f'<svg viewBox="{size[1]}" role="img" aria-labelledby="{name}-title {name}-description" xmlns:xlink="http://www.w3.org/1999/xlink">'
    told = f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-description">{html.escape(description)}</desc>'
    return opening + told + drawn[drawn.index(">") + 1 :].strip()


def _own_ids(drawn: str, name: str) -> str:
    """Ids that something refers to begin with `name`; all others, comments, metadata, rules for the whole page and digits that nobody sees go."""
    drawn = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", drawn, flags=re.DOTALL)
    drawn = _NUMBERS.sub(lambda attribute: re.sub(r"(\.\d\d)\d+", r"\1", attribute[0]), drawn)
    used = set(_REFERENCE.findall(drawn))
    drawn = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", drawn)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", drawn)


def _themed(drawn: str) -> str:
    """Known colours become variables of the page, fonts its own. Only attributes called style are touched: text stays as it is."""
    variables = {**INK, **LINES}
    for colour, variable in series_names().items():
        variables |= {colour.lower(): variable, text_colour(colour): f"{variable}-text"}

    def style(match: "re.Match[str]") -> str:
        text = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{variables[m[0]]})" if m[0] in variables else m[0], match[1])
        text = re.sub(r";? ?font-family: [^;]*", "", text)
        text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) [^;]*", lambda m: f"font-size: {m[2]}" + (f"; font-weight: {m[1]}" if m[1] else ""), text)
        return f' style="{text}"'

    drawn = re.sub(r' style="([^"]*)"', style, drawn)
    return re.sub(r"<text(?![^>]*fill:)([^>]*) style=\"", r'<text\1 style="fill: var(--ink); ', drawn)
