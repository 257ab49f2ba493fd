"""What `inspect` shows on a terminal, in a pipe or a file: findings in, text out.

On a terminal the tokens are coloured. Elsewhere the mask is marked in the text, so that it can be read, searched and
compared: `⟦supervised⟧`, `⟪control token⟫`, `⦃cut⦄`, `⦅left out⦆`, `↵` for a newline. These signs, control characters
and writing direction marks in people's text are shown as escapes (`\\u27e6`), so no content can pass for a mark, move
the cursor or colour the screen.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from minimind_sft.findings import Inspection
from minimind_sft.inspection_rows import CUT, LEFT_OUT, USED, Piece, Row

MARKS = {"supervised": "⟦⟧", "control": "⟪⟫", CUT: "⦃⦄", LEFT_OUT: "⦅⦆"}
STYLES = {  # SGR codes
    (USED, False, False): "",
    (USED, False, True): "1;36",
    (USED, True, False): "32",
    (USED, True, True): "1;30;42",
    LEFT_OUT: "2;3",
    CUT: "2;9",
}
BAR, BAR_CUT, BAR_WIDTH = "█", "░", 40
CUT_SHOWN = 40  # tokens of what is cut
_ESCAPED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069⟦⟧⟪⟫⦃⦄⦅⦆↵]")
ASCII = str.maketrans({"⟦": "[[", "⟧": "]]", "⟪": "<<", "⟫": ">>", "⦃": "{{", "⦄": "}}", "⦅": "((", "⦆": "))",
                        "↵": "$", "⇥": "\t", BAR: "#", BAR_CUT: "-"})


def visible(text: str) -> str:
    """Text without effects: newlines and tabs as signs, what could mislead as escapes."""
    text = _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.replace("\n", "↵\n").replace("\t", "⇥")


def one_line(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    shown = visible(" ".join(text.split()))
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def counts(row: Row) -> str:
    """`812 tokens used, 45 supervised (5.5 %), 102 cut`, and where it is not trained on, why."""
    share = row.supervised / max(row.used, 1)
    why = f"; not trained on: {row.not_trained}" if row.not_trained else ""
    return f"{row.used:,} tokens used, {row.supervised:,} supervised ({share:.1%}), {row.cut:,} cut{why}"


def shorten(pieces: list[Piece]) -> list[Piece]:
    """The pieces with only the first `CUT_SHOWN` tokens of what is cut."""
    shown, cut = [], 0
    for piece in pieces:
        if piece.state != CUT:
            shown.append(piece)
        elif cut < CUT_SHOWN:
            tokens = piece.tokens[: CUT_SHOWN - cut]
            cut += len(tokens)
            shown.append(piece._replace(tokens=tokens if cut < CUT_SHOWN else [*tokens, " ..."]))
    return shown


def row_text(row: Row, *, color: bool) -> str:
    """The tokens of a row, coloured or marked."""
    parts = []
    for state, of_state in itertools.groupby(shorten(row.pieces), lambda piece: piece.state):
        paint = _coloured if color else _marked
        inner = "".join(paint(of_state))
        parts.append(inner if color or state == USED else inner.join(MARKS[state]))
    return "".join(parts)


def _coloured(pieces: Iterable[Piece]) -> Iterator[str]:
    for piece in pieces:
        style = STYLES.get(piece.state) or STYLES[piece.state, piece.supervised, piece.control]
        text = visible("".join(piece.tokens))
        yield "\n".join(f"\033[{style}m{line}\033[0m" if style and line else line for line in text.split("\n"))


def _marked(pieces: Iterable[Piece]) -> Iterator[str]:
    for supervised, group in itertools.groupby(pieces, lambda piece: piece.supervised):
        texts = [(visible("".join(piece.tokens)), piece.control) for piece in group]
        inner = "".join(text.join(MARKS["control"]) if control else text for text, control in texts)
        yield inner.join(MARKS["supervised"]) if supervised else inner


def screen(found: Inspection, *, color: bool) -> str:
    """All that was found, as text."""
    blocks = [_legend(color)] if found.rows else []
    for row in found.rows:
        head = f"row {row.number:,} of {found.documents:,}  {visible(row.where)}  {counts(row)}"
        body = "\n".join(f"  {line}" for line in row_text(row, color=color).split("\n"))
        blocks.append(f"{_bold(head, color)}\n{body}")
    width = max(len(name) for name, _ in found.figures)
    lines = []
    for name, value in found.figures:
        lines.append(f"{name:<{width}}  {value}")
        if name == "rejected":
            for r in found.reasons:
                lines.append(f"{'':<{width}}  {r.lines:,} {r.reason}, the first: {one_line(r.first, 160)}")
    blocks.append("\n".join(lines))
    blocks.append(_bold("length in tokens" + (f" ({BAR_CUT} cut)" if any(b.cut for b in found.bins) else ""), color)
                  + "\n" + _bars(found))
    if found.notable:
        table = [(n.what, n.value, n.where, n.text) for n in found.notable]
        lines = [f"  {what:<26}{one_line(value):<42}  {visible(where)}\n  {'':<26}{one_line(text, 90)}"
                 for what, value, where, text in table]
        blocks.append(_bold("the longest and the strangest rows", color) + "\n" + "\n".join(lines))
    blocks += [_bold(visible(warning), color) for warning in found.warnings]
    return "\n\n".join(blocks)


def _bold(text: str, color: bool) -> str:
    return f"\033[1m{text}\033[0m" if color else text


def _legend(color: bool) -> str:
    names = ("context", "control token", "supervised", "supervised control token", "left out in epoch 0", "cut")
    if color:
        return "  ".join(f"\033[{style}m{name}\033[0m" for name, style in zip(names, STYLES.values(), strict=True))
    return "context  ⟪control token⟫  ⟦supervised⟧  ⦅left out in epoch 0⦆  ⦃cut by max_length⦄  ↵ newline"


def bin_name(low: int, high: int | None) -> str:
    """`0-63`, or `704 and more`."""
    return f"{low:,} and more" if high is None else f"{low:,}-{high:,}"


def _bars(found: Inspection) -> str:
    most, lines = max((b.rows for b in found.bins), default=1), []
    for b in found.bins:
        cells = max(1, round(BAR_WIDTH * b.rows / most)) if b.rows else 0
        cut = round(cells * b.cut / b.rows) if b.rows else 0
        bar = BAR * (cells - cut) + BAR_CUT * cut
        lines.append(f"  {bin_name(b.low, b.high):>14}  {bar:<{BAR_WIDTH}}  {b.rows:>9,}")
    return "\n".join(lines)
