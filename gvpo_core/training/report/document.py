"""Makes one HTML document that loads nothing from elsewhere, and escapes foreign text."""

import base64
import hashlib
import html
from collections.abc import Iterable

from gvpo_core.training.report.assets import SCRIPT, STYLE
from gvpo_core.training.report.charts import Chart, figure
from gvpo_core.training.terminal.text import printable


def document(title: str, parts: Iterable[str]) -> str:
    """The HTML document.

    Args:
      title: text, which is escaped here.
      parts: HTML.
    """
    policy = f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><main>{"".join(part for part in parts if part)}</main><div id="tip"></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def chart_section(title: str, charts: Iterable[Chart]) -> str:
    """A heading with charts below it, as HTML."""
    drawn = "".join(figure(chart) for chart in charts)
    return f'<section><h2>{escaped(title)}</h2><div class="charts">{drawn}</div></section>'


def escaped(text: object, keep: str = "") -> str:
    """Escapes foreign text: control characters, except those in `keep`, and markup."""
    return html.escape(printable(str(text), keep=keep), quote=True)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
