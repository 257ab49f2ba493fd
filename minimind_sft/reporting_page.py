"""A report as one page that needs nothing else: runs and pictures in, HTML out.

All that comes from runs passes through `html.escape`, and a policy in the page forbids scripts and the network, so a
page made of hostile chats is safe to open and to send on. Pictures are inlined, light or dark as the reader's screen
is. A section without data says why it has none. Two runs make a page of about 1 MB, nearly all of it pictures.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minimind_sft import __version__
from minimind_sft.inspection_screen import visible
from minimind_sft.reporting_plots import Picture
from minimind_sft.reporting_table import cell_rows, figure_rows, flat, notes
from minimind_sft.run_record import COUNTS, Fact, Run

GENERATOR = '<meta name="generator" content="minimind_sft report">'
MOST_NAMED = 400  # facts in a list

_HEAD = """\
<!doctype html>
<html lang="{lang}">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
{generator}
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1c1e21; --back: #fff; --soft: #6a6f76; --line: #d8dade; --mark: #fff3d6; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e4e6e9; --back: #17191c; --soft: #969ba3; --line: #383c42;
  --mark: #3d3419; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }} h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .3rem; }}
h3 {{ font-size: 1rem; margin: 1rem 0 .2rem; }} p {{ margin: .3rem 0 .8rem; }}
.soft {{ color: var(--soft); }} .none {{ color: var(--soft); font-style: italic; }}
.note {{ border-left: 4px solid #D55E00; padding-left: .8rem; }}
img {{ display: block; max-width: 100%; height: auto; margin: .5rem 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem 1.2rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }}
th {{ color: var(--soft); font-weight: 600; }}
td.n, th.n {{ text-align: right; white-space: nowrap; }}
.long td {{ min-width: 8rem; max-width: 34rem; overflow-wrap: anywhere; }}
.long td:first-child {{ white-space: nowrap; }} .differs td {{ background: var(--mark); }}
.differs td:first-child::after {{ content: " \\2260"; }}
details {{ margin: .5rem 0; }} summary {{ cursor: pointer; }}
.answers {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr));
  margin: .3rem 0 1.5rem; }}
.answers div {{ border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; overflow-wrap: anywhere; }}
.answers b {{ display: block; color: var(--soft); font-weight: 600; }} .asked {{ font-weight: 600; margin-bottom: 0; }}
</style>
"""


def is_report(path: Path) -> bool:
    """Whether a file is such a page."""
    return path.is_file() and GENERATOR in path.read_text(encoding="utf-8", errors="replace")[:1000]


def page(runs: Sequence[Run], pictures: Sequence[Picture], words: Mapping[str, str], lang: str) -> str:
    """The page of these runs."""
    drawn = {picture.name: picture for picture in pictures}
    head, figures = cell_rows(runs, words), figure_rows(runs, words)
    made = words["made"].format(count=len(runs), version=__version__)
    title = _text(f"{words['title']}: {', '.join(run.name for run in runs)}")
    parts = [
        _HEAD.format(generator=GENERATOR, title=title, lang=lang),
        f'<h1>{_text(words["title"])}</h1>\n<p class="soft">{_text(made)}</p>\n',
        *(f'<p class="note">{_text(note)}</p>\n' for note in notes(runs, words)),
        _table(head[0], head[1:], numbers=range(2, len(head[0]))),
        f'<p class="soft">{_text(_looks(runs, words, lang))}</p>\n',
        _folded(words["figures"], _table(figures[0], figures[1:], numbers=range(1, len(figures[0])))),
        *_pictured(drawn.get("trajectories"), words["trajectories"], words["trajectories_about"],
                   words["trajectories_none"]),
        *_pictured(drawn.get("steps"), words["steps_over"], "", words["steps_none"]),
        *_pictured(drawn.get("losses"), words["losses"], words["losses_about"], words["losses_none"]),
        *_without_replay(runs, drawn, words),
        *_sources(runs, drawn.get("sources"), words),
        *_facts(runs, drawn.get("facts"), words),
        *_answers(runs, words),
        *_settings(runs, words),
        *_records(runs, words["sample"], words["sample_about"], [flat(run.sample) for run in runs],
                  words["sample_none"]),
        *_records(runs, words["origin"], words["origin_about"], [_origin(run) for run in runs], ""),
    ]
    return "".join(parts) + "</html>\n"


# ---- sections


def _looks(runs: Sequence[Run], words: Mapping[str, str], lang: str) -> str:
    from minimind_sft.reporting_words import SEEN

    told = dict.fromkeys(SEEN[lang].get(run.seen, run.seen) for run in runs if run.seen is not None)
    return words["looks"].format(seen=", ".join(told) or words["looks_unknown"])


def _pictured(picture: Picture | None, title: str, about: str, none: str) -> list[str]:
    """A heading, and the picture or why there is none."""
    parts = [f"<h2>{_text(title)}</h2>\n"]
    if picture is None:
        return [*parts, f'<p class="none">{_text(none)}</p>\n']
    if about:
        parts.append(f'<p class="soft">{_text(about)}</p>\n')
    light, dark = (base64.b64encode(path.read_bytes()).decode() for path in (picture.light, picture.dark))
    return [
        *parts,
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{_text(title)}" src="data:image/png;base64,{light}"></picture>\n',
    ]


def _without_replay(runs: Sequence[Run], drawn: Mapping[str, Picture], words: Mapping[str, str]) -> list[str]:
    replayed = any("train/replay" in row for run in runs for row in run.metrics)
    return [] if replayed or "losses" not in drawn else [f'<p class="none">{_text(words["losses_no_replay"])}</p>\n']


def _sources(runs: Sequence[Run], picture: Picture | None, words: Mapping[str, str]) -> list[str]:
    without = words["sources_none"].format(runs=_names(run for run in runs if not run.sources))
    parts = _pictured(picture, words["sources"], words["sources_about"], without)
    found = [{source.name: source for source in run.sources} for run in runs]
    names = sorted({name for run in found for name in run},
                   key=lambda name: -max(run[name].forgetting for run in found if name in run))
    if not names:
        return parts
    rows = []
    for name in names:
        first = next(run[name] for run in found if name in run)
        cells = [f"{run[name].forgetting:+.4f}" if name in run else "-" for run in found]
        documents = "-" if first.documents is None else f"{first.documents:,}"
        rows.append([name or "(none)", documents, f"{first.before:.4f}", *cells])
    head = [words["source"], words["documents"], words["base_loss"], *(run.name for run in runs)]
    parts.append(_folded(f"{words['source']}: {len(names)}", _table(head, rows, numbers=range(1, len(head)))))
    return parts + _lacking(runs, [run for run in runs if not run.sources], without)


def _facts(runs: Sequence[Run], picture: Picture | None, words: Mapping[str, str]) -> list[str]:
    without = words["facts_none"].format(runs=_names(run for run in runs if run.facts is None))
    parts = _pictured(picture, words["facts"], words["facts_about"], without)
    known = [(run, run.facts) for run in runs if run.facts is not None]
    if not known:
        return parts
    groups = dict.fromkeys(key for _, facts in known for key in facts.groups)
    rows = [
        [_asked(key.split("/"), words), run.name, *(f"{facts.groups[key][count]:,}" for count in COUNTS)]
        for key in groups
        for run, facts in known
        if key in facts.groups
    ]
    head = [words["group"], words["run"], *(words[count] for count in COUNTS)]
    parts.append(_table(head, rows, numbers=range(2, len(head))))
    for run, facts in known:
        for title, which in (("named_lost", facts.lost), ("named_gained", facts.gained)):
            parts.append(_folded(words[title].format(run=run.name, count=len(which)), _named(which, words)))
        kept = _text("; ".join(facts.kept[:MOST_NAMED]) or "-")
        more = len(facts.kept) - MOST_NAMED
        kept += f"; {_text(words['more'].format(count=more))}" if more > 0 else ""
        parts.append(_folded(words["named_kept"].format(run=run.name, count=len(facts.kept)), f"<p>{kept}</p>\n"))
    return parts + _lacking(runs, [run for run in runs if run.facts is None], without)


def _asked(parts: Sequence[str], words: Mapping[str, str]) -> str:
    return ", ".join(words.get(part, part) for part in parts)


def _named(facts: Sequence[Fact], words: Mapping[str, str]) -> str:
    """Facts by name; first those that matter most: asked in raw text, and not in the chats."""
    ordered = sorted(facts, key=lambda fact: (fact.way != "raw", fact.in_sft))
    rows = [
        [fact.name, fact.answer, fact.said, _asked([fact.way, "in_sft" if fact.in_sft else "not_in_sft"], words)]
        for fact in ordered[:MOST_NAMED]
    ]
    table = _table([words["fact"], words["answer"], words["said"], words["group"]], rows) if rows else ""
    more = len(facts) - MOST_NAMED
    return table + (f"<p>{_text(words['more'].format(count=more))}</p>\n" if more > 0 else "")


def _answers(runs: Sequence[Run], words: Mapping[str, str]) -> list[str]:
    without = words["answers_none"].format(runs=_names(run for run in runs if not run.answers))
    parts = [f"<h2>{_text(words['answers'])}</h2>\n"]
    questions = dict.fromkeys(answer["question"] for run in runs for answer in run.answers)
    if not questions:
        return [*parts, f'<p class="none">{_text(without)}</p>\n']
    parts.append(f'<p class="soft">{_text(words["answers_about"])}</p>\n')
    for question in questions:
        given = [(run.name, answer) for run in runs for answer in run.answers if answer["question"] == question]
        cells = [(words["before"], said) for said in dict.fromkeys(answer["before"] for _, answer in given)]
        cells += [(words["after"] + (f": {name}" if len(runs) > 1 else ""), row["after"]) for name, row in given]
        boxes = "".join(f"<div><b>{_text(title)}</b>{_text(said) or '-'}</div>" for title, said in cells)
        parts.append(f'<p class="asked">{_text(question)}</p>\n<div class="answers">{boxes}</div>\n')
    return parts + _lacking(runs, [run for run in runs if not run.answers], without)


def _settings(runs: Sequence[Run], words: Mapping[str, str]) -> list[str]:
    """The settings in which the runs differ, then all."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    head = [words["setting"], *(run.name for run in runs)]
    rows = [[key, *(run.settings.get(key, words["not_recorded"]) for run in runs)] for key in keys]
    parts = [f"<h2>{_text(words['settings'])}</h2>\n"]
    if len(runs) > 1:
        # what a run's version did not know is no difference; where a run lies is none of training
        known = {key: {run.settings[key] for run in runs if key in run.settings} for key in keys}
        differ = [row for row in rows if len(known[row[0]]) > 1 and row[0] != "run_dir"]
        if differ:
            parts += [f"<h3>{_text(words['settings_differ'])}</h3>\n", _table(head, differ, kind="long")]
        else:
            parts.append(f'<p class="none">{_text(words["settings_same"])}</p>\n')
    return [*parts, _folded(words["settings_all"].format(count=len(keys)), _table(head, rows, kind="long"))]


def _records(
    runs: Sequence[Run], title: str, about: str, records: Sequence[Mapping[str, str]], none: str
) -> list[str]:
    """What the runs' records say, key by key; rows in which they differ are marked."""
    parts = [f"<h2>{_text(title)}</h2>\n"]
    lacking = [run for run, record in zip(runs, records, strict=True) if not record]
    if len(lacking) == len(runs):
        return [*parts, f'<p class="none">{_text(none.format(runs=_names(lacking)))}</p>\n']
    keys = dict.fromkeys(key for record in records for key in record)
    rows = [[key, *(record.get(key, "-") for record in records)] for key in keys]
    parts += [f'<p class="soft">{_text(about)}</p>\n', _table(["", *(run.name for run in runs)], rows, kind="long")]
    return parts + (_lacking(runs, lacking, none.format(runs=_names(lacking))) if none else [])


def _origin(run: Run) -> dict[str, str]:
    command = run.record.get("command")
    told = shlex.join(["python", "-m", "minimind_sft", *map(str, command)]) if isinstance(command, list) else ""
    rest = {key: value for key, value in run.record.items() if key != "command"}
    return ({"command": told} if told else {}) | flat(rest) | {"folder": str(run.folder)}


# ---- parts of a page


def _names(runs: Iterable[Run]) -> str:
    return ", ".join(run.name for run in runs)


def _lacking(runs: Sequence[Run], which: Sequence[Run], why: str) -> list[str]:
    return [f'<p class="none">{_text(why)}</p>\n'] if which and len(runs) > 1 else []


def _text(text: str) -> str:
    return escape(visible(text))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>\n{content}</details>\n"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Iterable[int] = (), kind: str = ""
) -> str:
    """A table of texts; the columns `numbers` to the right. Rows of `long` tables are marked where columns differ."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=n' if place in right else ''}>{_text(str(value))}</{tag}>"
            for place, value in enumerate(row)
        )

    lines = [f"<tr>{cells('th', head)}</tr>\n"]
    for row in rows:
        differs = kind == "long" and len(set(row[1:])) > 1
        lines.append(f"<tr{' class=differs' if differs else ''}>{cells('td', row)}</tr>\n")
    return f'<div class="wide"><table{f" class={kind}" if kind else ""}>\n{"".join(lines)}</table></div>\n'
