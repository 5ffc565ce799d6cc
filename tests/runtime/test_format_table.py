"""Tables of plain text."""

from tljax.runtime.tables import format_table


def test_columns_are_aligned_and_lines_have_no_trailing_spaces():
    rows = [("a", 1, "[bold]x[/]"), ("longer", 100, ":cat:")]
    assert format_table(("name", "count", "note"), rows, left=1).splitlines() == [
        "name    count        note",
        "a           1  [bold]x[/]",
        "longer    100       :cat:",
    ]
    assert format_table(("", ""), [("a", 1), ("longer", 20)], left=2).splitlines() == [
        "a       1",
        "longer  20",
    ]


def test_no_cell_is_cut_off_or_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    name = "a folder of many words/" * 40
    assert format_table(("name",), [(name,)]).splitlines() == ["name", name]
