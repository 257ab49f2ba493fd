"""The files of a run directory as a `Run`, whether it is finished, still training, stopped or of an older version.

Whatever is not there yet is left out, so that what is shown of a run never depends on its end; what is there and cannot
be read is an error. The path of a run is taken from `metrics.csv`, which grows while it trains; `forgetting.json`,
`probes.json` and `answers.json` come with its end. Neither torch nor Lightning: 1,000 logged steps are read in 20 ms.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from minimind_sft.origins import RECORDS, is_run
from minimind_sft.readings import numbers_first, read_metrics
from minimind_sft.run_record import COUNTS, FINISHED, RUNNING, STOPPED, Fact, Facts, Look, Run, Source


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read the runs in these folders, in this order.

    Raises:
        ValueError: a folder that is not there, is no run or is named twice; a file that cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        _require_run(path)
    places = [path.resolve() for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ValueError(f"{folders[number]} is the same run as {folders[places.index(place)]}; name each run once")
    return [_read_run(path, name) for path, name in zip(paths, names(places), strict=True)]


def names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that tell them apart: `sft`, or `a/sft` and `b/sft`."""
    found = []
    for place in places:
        parts = place.parts
        same = [other.parts for other in places if other != place]
        size = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in same)), len(parts))
        found.append("/".join(parts[-size:]))
    return found


def _require_run(path: Path) -> None:
    if path.is_file():
        raise ValueError(f"{path} is a file; name the folder of a run, such as runs/sft")
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; name the folder of a run, such as runs/sft")
    if not is_run(path):
        inside = sorted(str(folder) for folder in path.iterdir() if folder.is_dir() and is_run(folder))
        holds = f"; it holds runs, so name these: {' '.join(inside[:8])}" if inside else ""
        raise ValueError(f"{path} is no run: it lacks {' or '.join(RECORDS)}, which fit writes when it begins{holds}")


def _read_run(folder: Path, name: str) -> Run:
    metrics = _metrics(folder / "metrics.csv")
    summary = _object(folder / "forgetting.json")
    settings = _settings(folder / "config.yaml")
    with _as_fit_writes(folder / "forgetting.json"):
        looks = [_look(row) for row in metrics if "val/chat/loss" in row or "val/pretrain/loss" in row]
        looks = looks or _looks_of_summary(summary)
        ended = int(summary["after"]["step"]) if summary else None
        best = _best(summary, looks, ended, settings.get("model.max_forgetting"))
        sources = [_source(row) for row in (summary or {}).get("by_source") or []]
        seen = (summary or {}).get("seen")  # all that older runs tell
        seen = (summary or {}).get("text") or {True: "seen", False: "unseen", None: None}.get(seen, str(seen))
    probes = _object(folder / "probes.json")
    with _as_fit_writes(folder / "probes.json"):
        facts = _facts(probes) if probes else None
    answers = _json(folder / "answers.json") or []
    with _as_fit_writes(folder / "answers.json"):
        answers = [{part: str(row[part]) for part in ("question", "before", "after")} for row in answers]
    last = int(metrics[-1]["step"]) if metrics else ended
    whole = ended is not None and ended == last
    return Run(
        name=name,
        folder=folder,
        state=FINISHED if whole else RUNNING if _is_locked(folder / ".lock") else STOPPED,
        metrics=metrics,
        looks=looks,
        best=best,
        best_on=float(((summary or {}).get("best") or {}).get("looked_at", 1.0)),
        ended=ended,
        seen=seen,
        sources=sources,
        facts=facts,
        answers=answers,
        settings=settings,
        sample=_object(folder / "sample.json"),
        record=_object(folder / "run.json") or {},
    )


@contextmanager
def _as_fit_writes(path: Path) -> Iterator[None]:
    """What is missing or of another type becomes an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: not what fit writes ({type(error).__name__}: {error}); restore it, or delete it to report "
            "without it"
        ) from error


def _json(path: Path) -> Any:
    """The content of a file; None where there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); restore it, or delete it to report without it") from error


def _object(path: Path) -> dict[str, Any] | None:
    content = _json(path)
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path}: not what fit writes (no object); restore it, or delete it to report without it")
    return content


def _metrics(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    try:
        rows = read_metrics(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); make it readable, or delete it") from error
    if not all(math.isfinite(row.get("step", math.nan)) for row in rows):
        raise ValueError(f"{path}: there is a row without a step; remove it, or delete the file to report without it")
    return rows


def _look(row: Mapping[str, float]) -> Look:
    names = ("val/chat/loss", "val/pretrain/loss", "val/forgetting", "val/pretrain/bits_per_byte")
    return Look(int(row["step"]), *(row.get(name) for name in names))


def _looks_of_summary(summary: dict[str, Any] | None) -> list[Look]:
    if summary is None:
        return []
    before, after = summary["before"], summary["after"]
    started = 0.0 if summary.get("forgetting") is not None else None
    return [
        Look(
            int(when["step"]),
            _number(when.get("chat_loss")),
            _number(when.get("pretrain_loss")),
            _number(forgotten),
            _number(when.get("bits_per_byte")),
        )
        for when, forgotten in ((before, started), (after, summary.get("forgetting")))
    ]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _source(row: dict[str, Any]) -> Source:
    documents = row.get("documents")
    return Source(
        str(row["source"] or ""),
        None if documents is None else int(documents),
        *(math.nan if row[name] is None else float(row[name]) for name in ("before", "forgetting")),
    )


def _best(summary: dict[str, Any] | None, looks: Sequence[Look], ended: int | None, bound: str | None) -> Look | None:
    """The run's own choice where its end is recorded; else the lowest loss so far within `model.max_forgetting`, or
    where none is within it, the one that forgot least: as `measuring.Measure` chooses."""
    if summary and looks and ended == looks[-1].step:
        chosen = summary.get("best")
        return next((look for look in looks if chosen and look.step == chosen["step"]), None)
    scores = [(look.text if look.chat is None else look.chat, look) for look in looks if look.step]
    scored = [(score, look) for score, look in scores if score is not None and math.isfinite(score)]
    if bound not in (None, "null"):
        forgotten = [(numbers_first(look.forgetting or 0.0), look) for _, look in scored]
        within = [look for rise, look in forgotten if rise <= float(bound)]
        scored = [pair for pair in scored if pair[1] in within] or forgotten
    return min(scored, default=(0.0, None))[1]


def _facts(probes: dict[str, Any]) -> Facts:
    replies = probes.get("replies") or []
    return Facts(
        groups={name: {count: int(group[count]) for count in COUNTS} for name, group in probes["groups"].items()},
        kept=[str(row["name"]) for row in replies if row["before"]["raw_right"] and row["after"]["raw_right"]],
        lost=[_fact(row) for row in probes["lost"]],
        gained=[_fact(row) for row in probes["gained"]],
    )


def _fact(row: dict[str, Any]) -> Fact:
    name, way, answer, said = (str(row[field]) for field in ("name", "way", "answer", "said"))
    return Fact(name, way, bool(row["in_sft"]), answer, said)


def _settings(path: Path) -> dict[str, str]:
    """Every setting by its name on the command line, as YAML writes its value."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())}); restore it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no settings, which are `key: value` lines; restore it")
    found: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": _written(inner) for name, inner in value.items()}
        else:
            found[str(key)] = _written(value)
    return found


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_locked(path: Path) -> bool:
    """Whether a process trains in the directory, as far as the file system can tell."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
