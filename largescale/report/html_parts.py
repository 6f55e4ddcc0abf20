"""Pieces of the report's page. Texts are plain and escaped here; what is called a body is HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

escape = html.escape

_LONG = 24
"""Characters from which on a cell is broken into lines: the columns beside it are to be seen as well."""


def document(title: str, header: str, body: str, *, head: str = "") -> str:
    """A whole page that stands alone.

    Args:
        title: plain.
        header: a body, shown at the top.
        body: all below it.
        head: what else the head of the page has, a body too.
    """
    style = Path(__file__).with_name("report.css").read_text()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>{head}'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{style}</style></head>'
        f"<body><main><header>{header}</header>{body}</main></body></html>\n"
    )


def section(title: str, text: str, body: str) -> str:
    """A part of the page."""
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{body}</section>"


def missing(text: str) -> str:
    """Why something is not shown."""
    return f'<p class="missing">{escape(text)}</p>'


def details(summary: str, body: str) -> str:
    """What is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int) -> str:
    """A table that scrolls by itself on a narrow screen; the first cell of a row is its header.

    Args:
        caption: what it is, for those who do not see it.
        heads: of the columns.
        rows: cells, plain.
        numbers_from: columns from there on are numbers, aligned to the right.
    """

    def cell(place: int, text: str) -> str:
        tag = 'th scope="row"' if place == 0 else "td"
        kind = "number" if place >= numbers_from else "long" if len(text) > _LONG else ""
        return f"<{tag}{f' class={kind}' if kind else ''}>{escape(text)}</{tag.split()[0]}>"

    head = "".join(
        f'<th scope="col"{" class=number" if place >= numbers_from else ""}>{escape(text)}</th>'
        for place, text in enumerate(heads)
    )
    body = "".join(f"<tr>{''.join(cell(place, text) for place, text in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f'<caption class="unseen">{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
