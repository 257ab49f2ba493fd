"""What `inspect` shows, as one page that needs nothing else: findings in, HTML out.

Every token is an element of its own, so that the cuts between tokens can be seen. All that comes from data passes
through `html.escape`, and a policy in the page forbids scripts and the network, so a page made from hostile data is
safe to open and to send on. Light or dark is the reader's choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from minimind_sft.findings import Inspection
from minimind_sft.inspection_rows import CUT, LEFT_OUT, Piece, Row
from minimind_sft.inspection_screen import bin_name, counts, one_line, shorten, visible

_HEAD = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1c1e21; --back: #fff; --soft: #6a6f76; --line: #d8dade; --learn: #c9efd0;
  --control: #7a3ea8; --bar: #3d7fc4; --cut: #c9ccd1; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e4e6e9; --back: #17191c; --soft: #969ba3; --line: #383c42;
  --learn: #1f4d2b; --control: #cfa3f2; --bar: #5b9bdc; --cut: #4b5057; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.row {{ border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; }}
.row p {{ margin: 0; padding: .4rem .8rem; border-bottom: 1px solid var(--line); color: var(--soft); }}
pre {{ font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; margin: 0; padding: .8rem; }}
i {{ font-style: normal; box-shadow: inset -1px 0 var(--line); }}
.s {{ background: var(--learn); }} .c {{ color: var(--control); font-weight: 600; }}
.x {{ color: var(--soft); text-decoration: line-through; }} .o {{ color: var(--soft); font-style: italic; }}
table {{ border-collapse: collapse; width: 100%; }} td {{ padding: .2rem .8rem .2rem 0; vertical-align: top; }}
td:first-child {{ white-space: nowrap; color: var(--soft); }} .n {{ text-align: right; width: 6rem; }}
.bar {{ display: flex; height: 1rem; margin-top: .25rem; }} .bar b {{ background: var(--bar); }}
.bar b + b {{ background: var(--cut); }} .warning {{ border-left: 4px solid #c33; padding-left: .8rem; }}
</style>
"""
_LEGEND = """\
<p>context, <i class="c">control token</i>, <i class="s">supervised</i>, <i class="s c">supervised control token</i>,
<i class="o">left out in epoch 0</i>, <i class="x">cut by max_length</i>; &#8629; is a newline</p>
"""


def page(found: Inspection, *, title: str) -> str:
    """The page of everything that `inspect_store` found."""
    parts = [_HEAD.format(title=escape(f"inspect {visible(title)}")), f"<h1>{escape(visible(title))}</h1>\n"]
    parts += [f'<p class="warning">{escape(visible(warning))}</p>\n' for warning in found.warnings]
    figures = [(name, escape(value)) for name, value in found.figures]
    reasons = [(f"{r.lines:,} {r.reason}", escape(f"the first: {visible(r.first)}")) for r in found.reasons]
    parts += ["<h2>The whole set</h2>\n", _table(figures)]
    if reasons:
        parts += ["<h2>Rejected</h2>\n", _table(reasons)]
    parts += ["<h2>Length in tokens</h2>\n", _bars(found)]
    if found.notable:
        cells = [
            (n.what, *(escape(text) for text in (one_line(n.value, 120), visible(n.where), one_line(n.text, 120))))
            for n in found.notable
        ]
        parts += ["<h2>The longest and the strangest rows</h2>\n", _table(cells)]
    if found.rows:
        parts += [f"<h2>The first {len(found.rows)} of {found.documents:,} rows</h2>\n", _LEGEND]
        parts += map(_row, found.rows)
    return "".join(parts) + "</html>\n"


def list_page(reason: str, rows: Iterable[tuple[str, str]]) -> str:
    """The page of the rows that ended under one reason: `file:line` and detail."""
    cells = [(escape(visible(where)), escape(visible(detail))) for where, detail in rows]
    head = f"{_HEAD.format(title=escape(reason))}<h1>{escape(reason)}: {len(cells):,} rows</h1>\n"
    return f"{head}{_table(cells)}</html>\n"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    """A table of cells that are HTML already."""
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n{''.join(lines)}</table>\n"


def _bars(found: Inspection) -> str:
    most = max((b.rows for b in found.bins), default=0) or 1
    rows = []
    for b in found.bins:
        parts = ((b.rows - b.cut) / most, b.cut / most)
        bar = "".join(f'<b style="width:{100 * part:.2f}%"></b>' for part in parts)
        rows.append(f'<tr><td class="n">{bin_name(b.low, b.high)}</td><td><div class="bar">{bar}</div></td>'
                    f'<td class="n">{b.rows:,}</td></tr>\n')
    return f"<table>\n{''.join(rows)}</table>\n"


def _row(row: Row) -> str:
    tokens = "".join(map(_piece, shorten(row.pieces)))
    return (f'<div class="row"><p>row {row.number:,} &middot; {escape(visible(row.where))} &middot; '
            f"{escape(counts(row))}</p>\n<pre>{tokens}</pre></div>\n")


def _piece(piece: Piece) -> str:
    classes = "s " * piece.supervised + "c " * piece.control + {CUT: "x", LEFT_OUT: "o"}.get(piece.state, "")
    start = f'<i class="{classes.strip()}">' if classes else "<i>"
    return "".join(f"{start}{escape(visible(token))}</i>" for token in piece.tokens)
