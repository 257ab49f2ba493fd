"""Pictures of a comparison, as PNGs: forgetting by source, by document, and facts.

Colours are from a palette that the colour-blind can tell apart; nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_sft.reporting_style import fonts, label
from minimind_sft.run_record import ASKED
from minimind_sft.significance import LEVEL

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.6"
MOST_SOURCES = 40
PICTURES = SOURCES, DOCUMENTS, FACTS = "sources.png", "documents.png", "facts.png"


def draw(result: dict[str, Any], documents: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Draw what there is to draw.

    Args:
        result: what `compare.json` holds.
        documents: a row per document of the text that was judged.
        folder: where to.

    Returns:
        The names of the files.
    """
    import matplotlib

    matplotlib.use("Agg")
    for name in PICTURES:  # an earlier comparison's would be taken for this one's
        (folder / name).unlink(missing_ok=True)
    drawn = []
    settings: Any = {"font.family": list(fonts())}
    with matplotlib.rc_context(settings):
        if documents:
            text = result["text"][result["judged"]]
            _sources(text, result["verdict"]["max_forgetting"], folder / SOURCES)
            _documents(documents, text, folder / DOCUMENTS)
            drawn += [SOURCES, DOCUMENTS]
        if "facts" in result:
            _facts(result["facts"]["groups"], folder / FACTS)
            drawn.append(FACTS)
    return drawn


def _sources(text: dict[str, Any], limit: float, path: Path) -> None:
    """One line per source with its interval, the most forgotten on top, and all of them together below."""
    import matplotlib.pyplot as plt

    rows = text["by_source"][:MOST_SOURCES]
    several = len(text["by_source"]) > 1
    named = [(label(row["source"] or "(none)", f"source {n}"), row) for n, row in enumerate(rows, 1)] if several else []
    left_out = len(text["by_source"]) - len(rows)
    named.append((f"all{f' (with {left_out} more sources)' if left_out else ''}", text))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.26 * len(named)), layout="constrained")
    for place, (_, row) in enumerate(named):
        overall = place == len(named) - 1
        color = ORANGE if overall else BLUE
        if row["interval"]:
            axes.plot(row["interval"], [place, place], color=color, linewidth=3 if overall else 1.5)
        filled = color if row["interval"] else "white"
        axes.plot(row["difference"], place, marker="D" if overall else "o", color=color, markerfacecolor=filled)
    axes.axvline(0, color=GREY, linewidth=1)
    if math.isfinite(limit):
        axes.axvline(limit, color="black", linewidth=1, linestyle=":")
        where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(f"allowed: {limit:g}", (limit, 1), xytext=(3, 3), **where)
    if len(named) > 1:
        axes.axhline(len(named) - 1.5, color="0.85", linewidth=1)
    axes.set_yticks(range(len(named)), [f"{name}  ({row['documents']:,})" for name, row in named])
    axes.set_ylim(len(named) - 0.4, -0.6)
    # two parents make an interval that would leave nothing else to be seen: it may run out of the picture
    points = [0.0, limit] + [row["difference"] for _, row in named] + list(text["interval"] or ())
    points = [point for point in points if math.isfinite(point)]  # a limit may be infinite, a broken model's loss NaN
    margin = 0.25 * ((max(points) - min(points)) or 1.0)
    low, high = min(points) - margin, max(points) + margin
    axes.set_xlim(low, high)
    for place, (_, row) in enumerate(named):  # an arrow where an interval goes on outside
        ends = row["interval"] or (low, high)
        for edge, marker, outside in ((low, "<", ends[0] < low), (high, ">", ends[1] > high)):
            if outside:
                axes.plot(edge, place, marker=marker, color=ORANGE if row is text else BLUE, clip_on=False)
    axes.set_xlabel(f"forgotten, nats per token\nlines are {LEVEL:.0%} intervals; hollow: one parent, so no interval")
    _finish(figure, axes, "What was forgotten, by source (documents)", path, pad=14)


def _documents(documents: Sequence[dict[str, Any]], text: dict[str, Any], path: Path) -> None:
    """Every document: its loss before, and by how much it rose."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    before, rise = [row["before"] for row in documents], [row["difference"] for row in documents]
    axes.scatter(before, rise, s=14, alpha=0.5, color=BLUE, linewidths=0)
    for number, row in enumerate(text["worst"][:3], 1):
        if math.isfinite(row["difference"]):
            axes.annotate(f"{number}", (row["before"], row["difference"]), xytext=(5, 1), textcoords="offset points")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axhline(text["difference"], color=ORANGE, linewidth=1.5)
    axes.annotate(
        f"all: {text['difference']:+.3f}",
        (1, text["difference"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=ORANGE,
    )
    names = "; ".join(f"{n} {_short(row['where'])}" for n, row in enumerate(text["worst"][:3], 1))
    axes.set_xlabel("loss of the base, nats per token" + (f"\nmost forgotten: {names}" if names else ""))
    axes.set_ylabel("forgotten, nats per token")
    _finish(figure, axes, "What was forgotten, by document", path)


def _facts(groups: dict[str, dict[str, Any]], path: Path) -> None:
    """Facts kept, lost and gained for each way of asking, in shares of those asked."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.55 * len(groups)), layout="constrained")
    hatches = {"kept": "", "lost": "///", "gained": "..."}
    for place, group in enumerate(groups.values()):
        start = 0.0
        for name, color in (("kept", BLUE), ("lost", ORANGE), ("gained", GREEN)):
            share = 100 * group[name] / group["probes"]
            label = name if place == 0 else None
            axes.barh(place, share, left=start, color=color, hatch=hatches[name], edgecolor="white", label=label)
            start += share
        counts = ", ".join(f"{group[name]} {name}" for name in ("kept", "lost", "gained"))
        axes.annotate(
            f"{counts} of {group['probes']}", (start, place), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(groups)), [", ".join(ASKED[part] for part in key.split("/")) for key in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 140)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the facts asked")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)  # bars may reach anywhere within the axes
    _finish(figure, axes, "Facts", path)


def _short(where: str) -> str:
    return label(where.rsplit("/", 1)[-1], f"line {where.rpartition(':')[-1]}")


def _finish(figure: Any, axes: Any, title: str, path: Path, *, pad: float = 6) -> None:
    import matplotlib.pyplot as plt

    axes.set_title(title, loc="left", pad=pad)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
