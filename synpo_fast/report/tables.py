"""HTML tables for the report."""

from __future__ import annotations

from collections.abc import Sequence

MAX_STACKED = 4  # at most so many columns in a table that a phone shows with the row's name above its cells


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table as HTML. head and rows hold markup; the first cell of a row is its name. kind: CSS classes of style.py."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    columns = len(head) - 1
    if columns > MAX_STACKED:  # too many to fit a phone's width: they scroll
        kind = " ".join(word for word in kind.split() if word != "stack")
    return (
        f'<div class="scroll"><table class="{kind}" style="--columns:{columns}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def table_card(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table in a card of its own."""
    return f'<div class="card">{table(head, rows, kind)}</div>'
