"""The pictures of a report, as PNGs in a light and a dark theme: what learning to chat cost, and how it came about.

In come runs, out come files, called `NAME.png` and `NAME_dark.png`. A picture takes 0.1 s in each theme, which is why
none is drawn with pyplot, whose import alone takes 0.2 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minimind_sft.reporting_style import (
    DARK,
    LIGHT,
    MARKERS,
    MOST_POINTS,
    Theme,
    dress,
    fonts,
    known,
    label,
    legend,
    line_style,
)
from minimind_sft.run_record import ASKED, Run, Source

MOST_SOURCES = 30
MOST_NOISY = 3  # runs whose noisy lines can be told apart
LEARNING_RATE = "learning rate"
DPI = 130


Paint = Callable[[Any, Sequence[Run], Theme], bool]  # fills a figure; whether there was anything to show
Pane = tuple[str, list[list[tuple[float, float | None]]]]  # a title, and per run its points


class Picture(NamedTuple):
    """A picture in both themes."""

    name: str
    light: Path
    dark: Path


def draw(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """Draw what there is to draw of the runs, and remove what an earlier report drew and this one does not.

    Returns:
        The pictures, called `trajectories`, `steps`, `losses`, `sources` and `facts`; those without data are left out.
    """
    import matplotlib

    settings: Any = {"font.family": list(fonts())}
    with matplotlib.rc_context(settings):
        found = [_draw(name, paint, runs, folder) for name, paint in _PICTURES.items()]
    return [picture for picture in found if picture is not None]


def picture_names() -> list[str]:
    """The files that `draw` may write, or remove where there is nothing to show."""
    return [f"{name}{theme.suffix}.png" for name in _PICTURES for theme in (LIGHT, DARK)]


def _draw(name: str, paint: Paint, runs: Sequence[Run], folder: Path) -> Picture | None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    paths, places = [], None
    for theme in (LIGHT, DARK):
        figure = Figure(layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08), facecolor=theme.back, dpi=DPI)
        paths.append(folder / f"{name}{theme.suffix}.png")
        if paint(figure, runs, theme):
            for axes in figure.axes:
                dress(axes, theme, grid=paint is not _facts)  # its counts stand where lines would cross them
            places = _save(figure, paths[-1], places)
        else:
            paths[-1].unlink(missing_ok=True)
    return Picture(name, *paths) if places is not None else None


def _save(figure: Any, path: Path, places: list[Any] | None) -> list[Any]:
    """Write a figure, laid out as `places` say, or anew: where each of its axes stands.

    A quarter of the time goes into finding the layout, which does not depend on the theme.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    if places is None:
        figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # else saving lays it out once more, by drawing it twice
    for axes, place in zip(figure.axes, places or (), strict=False):
        axes.set_position(place)
    figure.savefig(path, facecolor=figure.get_facecolor(), pil_kwargs={"compress_level": 4})
    return [axes.get_position() for axes in figure.axes]


# ---- the pictures: each fills a figure, and says whether there was anything to show


def _trajectories(figure: Any, runs: Sequence[Run], theme: Theme) -> bool:
    """Chat loss against forgetting: one path a run, the base a dot."""
    paths = [
        [(look.chat, look.forgetting) for look in run.looks if None not in (look.chat, look.forgetting)] for run in runs
    ]
    if not any(paths):
        return False
    figure.set_size_inches(8, 5)
    axes = figure.subplots()
    axes.axhline(0, color=theme.soft, linewidth=0.8)
    for number, (run, path) in enumerate(zip(runs, paths, strict=True)):
        if not path:
            continue
        style = line_style(number, theme, points=len(path))
        axes.plot(*zip(*path, strict=True), **style)
        if run.best and None not in (run.best.chat, run.best.forgetting):
            mark = {"marker": style["marker"] or MARKERS[number % len(MARKERS)], "color": style["color"]}
            mark |= {"markersize": 11, "markerfacecolor": theme.back, "markeredgewidth": 2, "zorder": 4}
            axes.plot(run.best.chat, run.best.forgetting, **mark)
    for base in {path[0] for path, run in zip(paths, runs, strict=True) if path and run.looks[0].step == 0}:
        axes.plot(*base, color=theme.text, marker="o", markersize=9, zorder=5)
        axes.annotate("base", base, xytext=(-4, 9), textcoords="offset points", ha="right", color=theme.text)
    axes.invert_xaxis()
    axes.margins(0.08)
    axes.set_xlabel("loss on validation chats, nats per token (better to the right)")
    axes.set_ylabel("forgotten, nats per token of text")
    legend(figure, runs, theme, paths)
    return True


def _steps(figure: Any, runs: Sequence[Run], theme: Theme) -> bool:
    """Chat loss and forgetting over steps."""
    panes: list[Pane] = [
        ("loss on validation chats, nats per token", [[(k.step, k.chat) for k in run.looks] for run in runs]),
        ("forgotten, nats per token of text", [[(k.step, k.forgetting) for k in run.looks] for run in runs]),
    ]
    return _over_steps(figure, runs, theme, panes)


def _losses(figure: Any, runs: Sequence[Run], theme: Theme) -> bool:
    """What training logged: its loss, that of the replayed text, the learning rate."""
    panes: list[Pane] = []
    for column, title in (
        ("train/loss", "training loss on chats, nats per token"),
        ("train/replay", "loss on replayed text, nats per token"),
        ("lr", LEARNING_RATE),
    ):
        panes.append((title, [[(row["step"], row.get(column)) for row in run.metrics] for run in runs]))
    return _over_steps(figure, runs, theme, panes)


def _over_steps(figure: Any, runs: Sequence[Run], theme: Theme, panes: Sequence[Pane]) -> bool:
    """A pane for each title under which any run has points; a noisy line lies thin behind its running mean."""
    shown = [
        (title, [[(step, y) for step, y in path if y is not None] for path in paths])
        for title, paths in panes
        if any(y is not None for path in paths for _, y in path)
    ]
    if not shown:
        return False
    figure.set_size_inches(4.2 * len(shown) + 0.4, 3.8)
    for axes, (title, paths) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for number, path in enumerate(paths):
            if not path:
                continue
            steps, values = zip(*path, strict=True)
            style = line_style(number, theme, points=len(path))
            if len(path) > MOST_POINTS and title != LEARNING_RATE:
                if len(runs) <= MOST_NOISY:
                    axes.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.35)
                values = tuple(_smoothed(values))
            axes.plot(steps, values, **style)
        axes.set_title(title, loc="left", fontsize=10, color=theme.text)
        axes.set_xlabel("step")
    legend(figure, runs, theme, [any(paths[number] for _, paths in shown) for number in range(len(runs))])
    return True


def _sources(figure: Any, runs: Sequence[Run], theme: Theme) -> bool:
    """What was forgotten of every source of the text, the most forgotten on top."""
    found = [{source.name: source for source in run.sources} for run in runs]
    names = sorted({name for run in found for name in run}, key=lambda name: -_most(found, name))[:MOST_SOURCES]
    if not names:
        return False
    figure.set_size_inches(8, 1.3 + 0.28 * len(names))
    axes = figure.subplots()
    axes.axvline(0, color=theme.soft, linewidth=0.8)
    for number, sources in enumerate(found):
        points = [(sources[name].forgetting, place) for place, name in enumerate(names) if name in sources]
        if points:
            style = line_style(number, theme, points=1) | {"linestyle": "none", "markersize": 7}
            axes.plot(*zip(*points, strict=True), **style)
    labels = [label(name or "(none)", f"source {place}") + _counted(found, name) for place, name in enumerate(names, 1)]
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.set_xlabel("forgotten, nats per token of text (documents in brackets)")
    legend(figure, runs, theme, found, "none")
    return True


def _counted(found: Sequence[dict[str, Source]], name: str) -> str:
    """The documents of a source in brackets, where all runs have read as many."""
    counts = {sources[name].documents for sources in found if name in sources}
    return f"  ({count:,})" if len(counts) == 1 and (count := counts.pop()) else ""


def _facts(figure: Any, runs: Sequence[Run], theme: Theme) -> bool:
    """Facts kept, lost and gained by every run, in shares of those asked."""
    groups = list(dict.fromkeys(key for run in runs if run.facts for key in run.facts.groups))
    bars = [(key, run) for key in groups for run in runs if run.facts and key in run.facts.groups]
    if not bars:
        return False
    figure.set_size_inches(8.6, 1.4 + 0.34 * len(bars) + 0.25 * len(groups))
    axes = figure.subplots()
    places = [number + 0.6 * groups.index(key) for number, (key, _) in enumerate(bars)]  # groups stand apart
    labels: list[str] = []
    for place, (key, run) in zip(places, bars, strict=True):
        assert run.facts
        _fact_bar(axes, place, run.facts.groups[key], theme, named=not labels)
        asked = ", ".join(ASKED.get(part, part) for part in key.split("/"))
        labels.append(asked if len(runs) == 1 else f"{asked}: {label(*known(runs, run), longest=18)}")
    axes.set_yticks(places, labels)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set_xlim(0, 150)  # a bar may reach 100, and its counts stand behind it
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the facts asked", loc="left")
    for text in figure.legend(loc="outside upper right", ncols=3, frameon=False).get_texts():
        text.set_color(theme.text)
    return True


def _fact_bar(axes: Any, place: float, group: dict[str, int], theme: Theme, *, named: bool) -> None:
    """What was kept, lost and gained, end to end; `named` for the legend."""
    start = 0.0
    for name, color, hatch in zip(("kept", "lost", "gained"), theme.facts, ("", "////", "...."), strict=True):
        share = 100 * group[name] / max(1, group["probes"])
        look = {"color": color, "hatch": hatch, "edgecolor": theme.back, "linewidth": 0.5}
        axes.barh(place, share, left=start, height=0.82, label=name if named else None, **look)
        start += share
    counts = f"{group['kept']:,} kept, {group['lost']:,} lost, {group['gained']:,} gained of {group['probes']:,}"
    where: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(counts, (start, place), color=theme.text, **where)


_PICTURES: dict[str, Paint] = {
    "trajectories": _trajectories,
    "steps": _steps,
    "losses": _losses,
    "sources": _sources,
    "facts": _facts,
}


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running means over a twentieth of the points."""
    reach = len(values) // 40
    means = []
    for place in range(len(values)):
        around = [value for value in values[max(0, place - reach) : place + reach + 1] if math.isfinite(value)]
        means.append(sum(around) / len(around) if around else math.nan)
    return means


def _most(found: Sequence[dict[str, Source]], name: str) -> float:
    return max(sources[name].forgetting for sources in found if name in sources)
