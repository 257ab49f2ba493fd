"""How a report's pictures look: themes, a line for every run, a legend, names that the fonts can write.

Every run has a colour that the colour-blind can tell apart (Okabe and Ito's), and besides a line and a marker of its
own, so nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from minimind_sft.run_record import Run

MOST_POINTS = 60  # with more, a line has no markers
LONGEST_NAME = 34
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "SimHei",
    "Arial Unicode MS",
)


class Theme(NamedTuple):
    """Colours of a picture; of the runs, in their order."""

    suffix: str  # of the file's name
    back: str
    text: str
    soft: str
    grid: str
    runs: tuple[str, ...]
    facts: tuple[str, str, str]  # kept, lost, gained


LIGHT = Theme(
    suffix="",
    back="#ffffff",
    text="#1c1e21",
    soft="#6a6f76",
    grid="#e3e5e8",
    runs=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    facts=("#0072B2", "#D55E00", "#009E73"),
)
DARK = Theme(
    suffix="_dark",
    back="#17191c",
    text="#e4e6e9",
    soft="#969ba3",
    grid="#32363b",
    runs=("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#ffffff"),
    facts=("#56B4E9", "#D55E00", "#009E73"),
)
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # with seven colours, 56 runs before two look alike


def line_style(number: int, theme: Theme, *, points: int) -> dict[str, Any]:
    """Colour, line and marker of run `number`."""
    return {
        "color": theme.runs[number % len(theme.runs)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)] if points <= MOST_POINTS else None,
        "markersize": 4,
        "linewidth": 2,
    }


def legend(figure: Any, runs: Sequence[Run], theme: Theme, shown: Sequence[Any], linestyle: str | None = None) -> None:
    """Which line is which run, above the picture, of the runs that show something; one run alone needs none."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        return
    numbers = [number for number in range(len(runs)) if shown[number]]
    more = {} if linestyle is None else {"linestyle": linestyle, "markersize": 7}
    keys = [Line2D([], [], **line_style(number, theme, points=1) | more) for number in numbers]
    names = [label(*known(runs, runs[number])) for number in numbers]
    width = max(map(len, names)) * 0.085 + 0.8  # inches
    columns = max(1, min(len(names), int(figure.get_figwidth() / width)))
    figure.set_figheight(figure.get_figheight() + 0.22 * (math.ceil(len(names) / columns) - 1))
    drawn = figure.legend(keys, names, loc="outside upper left", ncols=columns, frameon=False, handlelength=3.2)
    for text in drawn.get_texts():
        text.set_color(theme.text)


def dress(axes: Any, theme: Theme, *, grid: bool) -> None:
    """Put axes in the colours of a theme."""
    axes.set_facecolor(theme.back)
    if grid:
        axes.set_axisbelow(True)
        axes.grid(color=theme.grid, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.soft)
    axes.tick_params(color=theme.soft, labelcolor=theme.text)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(theme.text)
        axis.offsetText.set_color(theme.text)


def known(runs: Sequence[Run], run: Run) -> tuple[str, str]:
    """A run by its name, or else by its place in the table of the report."""
    return run.name, f"run {runs.index(run) + 1}"


def label(name: str, else_called: str, longest: int = LONGEST_NAME) -> str:
    """A name as a picture can hold it: its end, which tells it apart; or the other one where fonts lack a character."""
    if not name.isprintable() or not set(map(ord, name)) <= _characters():
        return else_called
    shown = name if len(name) <= longest else "…" + name[1 - longest :]
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # Matplotlib leaves names with _ out of a legend


@cache
def fonts() -> tuple[str, ...]:
    """Matplotlib's own font, and behind it one that has Chinese where the machine has any."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *[name for name in CHINESE_FONTS if name in there][:1])


@cache
def _characters() -> frozenset[int]:
    """The code points that these fonts have."""
    from matplotlib import font_manager

    found = [font_manager.get_font(font_manager.findfont(name)) for name in fonts()]
    return frozenset(code for font in found for code in font.get_charmap())
