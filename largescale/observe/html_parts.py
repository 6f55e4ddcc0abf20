"""Pieces of the report's page."""

from __future__ import annotations

import html


def section(title: str, text: str, body: str) -> str:
    """A part of the page; title and text are plain, the body is HTML."""
    paragraph = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{paragraph}{body}</section>"


def missing(text: str) -> str:
    """Why something is not shown."""
    return f'<p class="missing">{html.escape(text)}</p>'
