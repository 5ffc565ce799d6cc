"""HTML elements of the report: escaped text, tables, plots, photos and the page around them."""

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from PIL import Image

if TYPE_CHECKING:
    import matplotlib.figure

MAX_ROWS = 1_000  # per table, so that a report of many classes stays small
MAX_ROWS_WITHOUT_FILTER = 20  # a longer table scrolls and can be filtered
LARGEST_PIXEL_ART = 64  # largest side, in pixels, of an image that is enlarged with hard edges
PHOTO_SIDE = 320  # twice the width at which the page shows a photo


def encodable(text: str) -> str:
    """Escape the bytes of a file name that are not Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def escape(text: str) -> str:
    """Return text as HTML."""
    return html.escape(encodable(text))


def cells(*texts: str) -> str:
    """Return the cells of a row of a table."""
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def numbers(*texts: str) -> str:
    """Return cells that are aligned right."""
    return "".join(f'<td class="number">{escape(text)}</td>' for text in texts)


def table(title: str, header: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table in a box that scrolls, with a field to filter its rows if there are many.

    Args:
        title: the contents and the order of the rows.
        header: the heading of each column; without one the table has no filter.
        rows: for each row, its cells in HTML; only the first `MAX_ROWS` are shown.
    """
    if not rows:
        return ""
    head = "".join(f"<th>{text}</th>" for text in header)
    head = head and f"<thead><tr>{head}</tr></thead>\n"
    body = "".join(f"<tr>{cells}</tr>\n" for cells in rows[:MAX_ROWS])
    box = _box("table", title, f"<table>\n{head}<tbody>\n{body}</tbody></table>")
    if len(rows) <= MAX_ROWS_WITHOUT_FILTER or not header:
        return box
    cut = f", {MAX_ROWS:,} shown" if len(rows) > MAX_ROWS else ""
    label = escape(title)
    return (
        f'<p class="filter">{label}: {len(rows):,} rows{cut}<input type="search" hidden'
        f' placeholder="filter" aria-label="Filter the rows: {label}"></p>\n{box}'
    )


def _box(kind: str, label: str, content: str) -> str:
    """Return a box that scrolls, also by keyboard."""
    label = escape(label)
    return f'<div class="{kind}" role="group" tabindex="0" aria-label="{label}">{content}</div>\n'


def plot(figure: "matplotlib.figure.Figure", description: str) -> str:
    """Return a plot in a box that scrolls."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=192, transparent=True)
    width, height = np.round(96 * figure.get_size_inches()).astype(int)
    # On a narrow screen, a plot scrolls instead of becoming too small to read.
    size = f'width="{width}" height="{height}" style="min-width:{0.6 * width:.0f}px"'
    image = f'<img {size} alt="{escape(description)}" src="{_data_uri(buffer, "png")}">'
    return _box("plot", "Plot", image)


def photo(pixels: UInt8[np.ndarray, "_height _width 3"], description: str) -> str:
    """Return an image; small ones are enlarged with hard edges."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    alt = escape(description)
    if max(image.size) <= LARGEST_PIXEL_ART:
        image.save(buffer, "PNG")
        return f'<img class="pixels" alt="{alt}" src="{_data_uri(buffer, "png")}">'
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    image.save(buffer, "JPEG", quality=85)
    return f'<img alt="{alt}" src="{_data_uri(buffer, "jpeg")}">'


def _data_uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(title: str, body: str) -> str:
    """Return a whole page; ``body`` is HTML, ``title`` is text."""
    style, script = (
        files("tljax.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    return _PAGE.format(
        title=escape(title),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        body=body,
    )


# The policy allows no script but the one of this package and no request: a name that should ever
# slip through unescaped can neither run nor fetch anything.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}<script>{script}</script>
</body>
</html>
"""
