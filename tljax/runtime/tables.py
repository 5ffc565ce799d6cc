"""Plain-text tables."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """Return rows as lines of aligned columns below a header, without a frame.

    Args:
        header: the names of the columns; no line is printed for empty ones.
        rows: cells, converted by `str`.
        left: the number of columns, from the first, that are aligned left; the others are aligned
            right.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(header), header_style=None)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(width=10_000, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(map(str.rstrip, capture.get().splitlines()))
