"""What a person sees: the first screen, the table at the end, one picture. Text in, text out; printing is the
caller's.
"""

from __future__ import annotations

import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_sft.readings import perplexity
from minimind_sft.run_record import ASKED

if TYPE_CHECKING:  # torchmetrics takes seconds to import, and only annotations need it
    from minimind_sft.budgeting import Trial
    from minimind_sft.forgetting import Reading
    from minimind_sft.interpolation import Point
    from minimind_sft.power_law import PowerLaw


def no_more_output() -> None:
    """Nobody reads standard output any more: `| head` has seen enough. Without this, Python complains at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """A text as standard output can hold it: what its encoding has not is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """`name   value` lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def later_rows(rows: Sequence[tuple[str, str]]) -> str:
    """Rows that follow the first screen, as wide as its own."""
    return aligned([(f"{name:<15}", value) for name, value in rows])


def _width(text: str) -> int:
    """Columns on a terminal; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a heading; the first one to the left, the others to the right."""
    widths = [max(_width(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [cell + gap if i == 0 else gap + cell for i, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def rejected(counts: dict[str, int]) -> str:
    """`3 not_json, 1 empty`, or `none`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"


def megabytes(size: float) -> str:
    """Bytes as MB of 1024 * 1024 bytes."""
    return f"{size / (1 << 20):,.2f} MB"


def forgetting_table(
    before: Reading, after: Reading, best: Reading | None, *, text: str | None, from_base: bool = True
) -> str:
    """Before, after and best: nats per token, perplexity, bits per byte, and what was forgotten of a base; `text` is
    what the text is to the base: seen, unseen or self-written."""
    columns = [("before", before), ("after", after)] + ([(f"best (step {best.step})", best)] if best else [])
    rows = []
    if before.chat_loss is not None:
        rows.append(["chats, nats per token", *(_number(r.chat_loss) for _, r in columns)])
        rows.append(["chats, perplexity", *(_number(r.chat_loss, perplexity, 1) for _, r in columns)])
    if before.pretrain_loss is not None:
        name = f"text ({text})"
        rows.append([f"{name}, nats per token", *(_number(r.pretrain_loss) for _, r in columns)])
        rows.append([f"{name}, perplexity", *(_number(r.pretrain_loss, perplexity, 1) for _, r in columns)])
        rows.append([f"{name}, bits per byte", *(_number(r.bits_per_byte) for _, r in columns)])
        if from_base:
            risen = [None if r.pretrain_loss is None else r.pretrain_loss - before.pretrain_loss for _, r in columns]
            rows.append(["forgotten, nats per token", *(_number(value, sign="+") for value in risen)])
    if before.own_chat_loss is not None:
        own, start = [r.own_chat_loss for _, r in columns], before.own_chat_loss
        rows.append(["the base's own chats, nats per token", *(_number(value) for value in own)])
        risen = [None if value is None else value - start for value in own]
        rows.append(["forgotten of its own chats", *(_number(value, sign="+") for value in risen)])
    if not rows:
        return "nothing was measured: set data.val_path and data.heldout_path or data.pretrain_path"
    return table(["", *(name for name, _ in columns)], rows)


def _number(
    value: float | None, change: Callable[[float], float] | None = None, digits: int = 4, sign: str = ""
) -> str:
    if value is None:
        return "-"
    return f"{change(value) if change else value:{sign}.{digits}f}"


def probe_table(comparison: dict[str, Any], *, most: int = 12) -> str:
    """Facts known before and after, and the losses by name."""
    rows = []
    for key, group in comparison["groups"].items():
        way, member = key.split("/")
        rows.append(
            [
                f"{ASKED[way]}, {ASKED[member]}",
                *(f"{group[c]:,}" for c in ("probes", "before", "after", "kept", "lost", "gained")),
            ]
        )
    text = table(["facts", "asked", "before", "after", "kept", "lost", "gained"], rows)
    if lost := lost_facts(comparison):
        text += f"\n\nforgot {len(lost)}: {'; '.join(lost[:most])}{'; ...' if len(lost) > most else ''}"
    return text


def lost_facts(comparison: dict[str, Any]) -> list[str]:
    """The facts that the chats do not mention and raw text no longer tells, each as `name, answer -> what is said`."""
    lost = [row for row in comparison["lost"] if row["way"] == "raw" and not row["in_sft"]]
    return [f"{row['name']}, {row['answer']} -> {_beginning(' '.join(row['said'].split()))}" for row in lost]


def _beginning(text: str, most: int = 24) -> str:
    """As much as there is room for, in whole words where it has any."""
    return text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ..."


@contextmanager
def chat_against_forgetting(path: Path, title: str, size: tuple[float, float] = (7, 4.5)) -> Iterator[Any]:
    """Chat loss against forgetting, as a PNG; yields axes for what is to be drawn, with chat losses on x."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, layout="constrained")
    yield axes
    axes.axhline(0, color="0.7", linewidth=1)
    axes.invert_xaxis()
    axes.margins(0.12)
    axes.set_xlabel("loss on validation chats, nats per token (better to the right)")
    axes.set_ylabel("forgotten, nats per token of pretraining text")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot(readings: Sequence[Reading], path: Path) -> None:
    """Chat loss against forgetting over the run, as a PNG; the base is the first reading."""
    start = readings[0].pretrain_loss
    points = [
        (r.step, r.chat_loss, r.pretrain_loss - start)
        for r in readings
        if r.chat_loss is not None and r.pretrain_loss is not None and start is not None
    ]
    if not points:
        return
    steps, chat, forgotten = zip(*points, strict=True)
    with chat_against_forgetting(path, "What learning to chat cost") as axes:
        axes.plot(chat, forgotten, color="#0072B2", linewidth=2, marker="o", markersize=4)
        axes.plot(chat[0], forgotten[0], color="#D55E00", marker="o", markersize=9)
        axes.annotate("base", (chat[0], forgotten[0]), textcoords="offset points", xytext=(0, 10), ha="center")
        for at in sorted({len(points) // 2, len(points) - 1} - {0}):
            where: dict[str, Any] = {"textcoords": "offset points", "xytext": (7, -11), "ha": "left"}
            axes.annotate(f"step {steps[at]}", (chat[at], forgotten[at]), **where)


def plot_interpolation(points: Sequence[Point], chosen: Point, path: Path) -> None:
    """Chat loss against forgetting from the base (alpha 0) to its fine-tune (alpha 1), as a PNG."""
    chat, forgotten = [point.chat_loss for point in points], [point.forgetting for point in points]
    with chat_against_forgetting(path, "From the base (alpha 0) to its fine-tune (alpha 1)") as axes:
        axes.plot(chat, forgotten, color="#0072B2", linewidth=2, linestyle=":", marker="o", markersize=4)
        axes.plot(chosen.chat_loss, chosen.forgetting, color="#D55E00", marker="o", markersize=9)
        for point in points:
            text = f"{point.alpha:g}" + (" chosen" if point is chosen else "")
            where: dict[str, Any] = {"textcoords": "offset points", "xytext": (-8, 2), "ha": "right"}
            axes.annotate(text, (point.chat_loss, point.forgetting), fontsize=9, **where)


def plot_budget(trials: Sequence[Trial], law: PowerLaw | None, max_forgetting: float, path: Path) -> None:
    """Chat loss, forgetting and minutes against MB of chats, as a PNG; what was not measured is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = [trial.mb for trial in trials]
    panels: tuple[tuple[str, Sequence[float | None]], ...] = (
        ("loss on validation chats, nats per token", [trial.chat_loss for trial in trials]),
        ("forgotten, nats per token of text", [trial.forgetting for trial in trials]),
        ("minutes", [trial.minutes for trial in trials]),
    )
    figure, panes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axes, (title, values) in zip(panes, panels, strict=True):
        shown = [(mb, value) for mb, value in zip(size, values, strict=True) if value is not None]
        axes.set_xscale("log")
        axes.set_xticks(size, [f"{mb:.3g}" for mb in size])
        axes.minorticks_off()
        axes.set_xlabel("MB of chats")
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if shown:
            axes.plot(*zip(*shown, strict=True), color="#0072B2", linewidth=2, marker="o", markersize=5)
    if any(trial.forgetting is not None for trial in trials):
        panes[1].axhline(max_forgetting, color="#D55E00", linewidth=1, linestyle="--", label="--max_forgetting")
        if law is not None:
            steps = [size[0] * (size[-1] / size[0]) ** (i / 40) for i in range(41)]
            curve = [law.at(mb) for mb in steps]
            panes[1].plot(steps, curve, color="0.4", linestyle=":", label=f"{law.a:.3g} MB^{law.b:.2f}")
        panes[1].legend(frameon=False, fontsize=9)
    panes[2].set_ylim(0, 1.1 * max(trial.minutes for trial in trials))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def ratio(sft_bytes: float, pretrain_bytes: int | None, rule: tuple[int, int]) -> str:
    """SFT : pretraining as 1 : N, beside the rule of thumb."""
    thumb = f"the rule of thumb is 1 : {rule[0]:,} to 1 : {rule[1]:,}"
    if not pretrain_bytes or not sft_bytes:
        return f"unknown (set data.pretrain_path or data.pretrain_mb); {thumb}"
    parts = pretrain_bytes / sft_bytes
    return f"1 : {parts:,.0f}; {thumb}" if parts >= 10 else f"1 : {parts:.2g}; {thumb}"


def chats_for_text(chats: int, documents: int) -> str | None:
    """What to say of text that is chats for the most part."""
    return f"{chats:,} of {documents:,} are chats, not text" if 2 * chats > documents else None


def text_for_chats(chats: int) -> str | None:
    """What to say of chats of which none has a turn."""
    return None if chats else "all of it is plain text, without a turn"


def likely_swapped(before: float, after: float) -> str | None:
    """What to say of a fine-tune that chats worse than its base: more often it is the base, in the wrong place."""
    return "TUNED is worse at the chats than BASE: are the two in this order?" if after > before else None


def never_better(before: float | None, best: float | None) -> str | None:
    """What to say of a run whose best reading of the chats is no better than the base's."""
    if before is None or best is None or best < before:
        return None
    return "the chats were never learned better than the base knew them: best is only the least bad reading"


def likely_not_its_tokenizer(loss: float, vocab_size: int) -> str | None:
    """What to say of a base that is far worse at chats than guessing: they may be new to it, but not their tokens."""
    return "far worse than guessing: is that tokenizer the base's own?" if loss >= math.log(vocab_size) + 1.0 else None


def likely_not_pretrained(loss: float, vocab_size: int) -> bool:
    """A base no better than guessing among all tokens has learned nothing."""
    return loss >= math.log(vocab_size)
