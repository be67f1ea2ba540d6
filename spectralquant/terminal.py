"""Tables in the terminal, all of one look."""

from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.table import Table


def make_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", words: Collection[str] = ()) -> Table:
    """Figures to the right; the first column, and those named in `words`, to the left."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i and name not in words else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    return table
