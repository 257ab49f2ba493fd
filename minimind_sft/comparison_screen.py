"""What `compare` prints: its result as tables for people. Text out; printing is the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minimind_sft.answer_format import RUN, TIMES
from minimind_sft.inspection_screen import one_line
from minimind_sft.report import aligned, table
from minimind_sft.run_record import ASKED
from minimind_sft.significance import LEVEL, RESAMPLES

MOST_SOURCES, MOST_WORST, MOST_NAMED = 12, 5, 8


def screen(result: dict[str, Any]) -> str:
    """All sections that were measured, the verdict last."""
    parts = [aligned([("base", result["base"]["description"]), ("tuned", result["tuned"]["description"])])]
    parts.append(_losses(result))
    if "judged" in result:
        text = result["text"][result["judged"]]
        parts += [_sources(text["by_source"]), _worst(text["worst"])]
    if result.get("answers"):
        parts.append(_answers(result["answers"]))
    if "facts" in result:
        parts.append(_facts(result["facts"]))
    if "retained" in result:
        parts.append(_retained(result["retained"]))
    parts += [f"note: {note}" for note in result["notes"]]
    if "judged" in result:
        parts.append(verdict_line(result["verdict"]))
    return "\n\n".join(part for part in parts if part)


def verdict_line(verdict: dict[str, Any]) -> str:
    """One sentence: what was forgotten, how sure that is, what was allowed."""
    limit, interval = verdict["max_forgetting"], verdict["interval"]
    sure = f" ({LEVEL:.0%} interval {_interval(interval, ' to ')})" if interval else ""
    said = "more than" if verdict["exceeded"] else "within"
    line = f"forgot {verdict['forgetting']:+.4f} nats per token of {verdict['judged']} text{sure}: {said} the "
    line += f"limit of {limit:g} (--max_forgetting)"
    if interval and interval[0] <= limit < interval[1]:
        line += (
            "\nthe limit lies within the interval: the point estimate decides, and more documents would make it surer"
        )
    return line


def _losses(result: dict[str, Any]) -> str:
    """One table of everything that is a loss."""
    rows: list[list[str]] = []
    about: list[str] = []
    for name, text in result["text"].items():
        rows += _loss_rows(f"text ({name})", text, full=True)
        cut = f", {text['cut']:,} cut" if text["cut"] else ""
        about.append(f"text ({name}): {_size(text, 'documents')}{cut}")
    if section := result.get("chats"):
        rows += _loss_rows("chats", section, full=False)
        about.append(f"chats: {_size(section, 'chats')}, on what the assistant says")
    if section := result.get("own_chats"):
        rows += _loss_rows("the base's own chats", section, full=False)
        about.append(f"the base's own chats: {_size(section, 'chats')}, on the answers; the base wrote them")
    if section := result.get("continuations"):
        rows += _loss_rows("second halves as a chat", section, full=False)
        itself = section["base_in_chat"]
        about.append(
            f"second halves as a chat: {_size(section, 'documents')}; the base reads the raw document, the tuned model "
            f"is asked to continue its first half (so asked, the base itself is at {itself['loss']:.4f}, "
            f"{itself['difference']:+.4f})"
        )
    if not rows:
        return ""
    if result["text"]:
        about.append(f"intervals: {RESAMPLES:,} resamples of whole parents within their sources, seed {result['seed']}")
    head = ["", "base", "tuned", "difference", f"{LEVEL:.0%} interval"]
    return table(head, rows) + "\n" + "\n".join(f"  {line}" for line in about)


def _loss_rows(name: str, section: dict[str, Any], *, full: bool) -> list[list[str]]:
    perplexity = section["perplexity"]
    rows = [
        [f"{name}, nats per token", *_three(section), _interval(section["interval"])],
        [f"{name}, perplexity", f"{perplexity['before']:.1f}", f"{perplexity['after']:.1f}", "", ""],
    ]
    if full:
        if bits := section.get("bits_per_byte"):
            rows.append([f"{name}, bits per byte", *_three(bits), _interval(bits["interval"])])
        rows.append(
            [f"{name}, KL(base || tuned), nats", "", "", f"{section['kl']:.4f}", _interval(section["kl_interval"])]
        )
        rows.append([f"{name}, same likeliest token", "", "", f"{section['agreement']:.1%}", ""])
    return rows


def _three(section: dict[str, Any]) -> list[str]:
    return [f"{section['before']:.4f}", f"{section['after']:.4f}", f"{section['difference']:+.4f}"]


def _interval(interval: Sequence[float] | None, between: str = " .. ") -> str:
    return "" if interval is None else f"{interval[0]:+.4f}{between}{interval[1]:+.4f}"


def _size(section: dict[str, Any], what: str) -> str:
    parents = f" of {section['parents']:,} parents" if section["parents"] != section["documents"] else ""
    return f"{section['documents']:,} {what}{parents}, {section['tokens']:,} tokens"


def _sources(rows: list[dict[str, Any]]) -> str:
    if len(rows) < 2:
        return ""
    shown = [
        [
            one_line(row["source"], 40) or "(none)",
            *(f"{row[name]:,}" for name in ("documents", "parents", "tokens")),
            *_three(row),
            _interval(row["interval"]) or "one parent",
        ]
        for row in rows[:MOST_SOURCES]
    ]
    head = ["source, most forgotten first", "documents", "parents", "tokens", "base", "tuned", "forgot", "interval"]
    more = len(rows) - len(shown)
    return table(head, shown) + (f"\n  and {more} more in compare.json" if more else "")


def _worst(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    shown = [
        [one_line(row["where"].rsplit("/", 1)[-1], 40), *_three(row), one_line(row["begins"], 48)]
        for row in rows[:MOST_WORST]
    ]
    # the last column to the left, and unpadded: Chinese is twice as wide as it is long
    head, rule, *lines = table(
        ["most forgotten documents", "base", "tuned", "forgot"], [row[:4] for row in shown]
    ).splitlines()
    return "\n".join([head, rule, *(f"{line}  {row[4]}" for line, row in zip(lines, shown, strict=True))])


def _answers(section: dict[str, Any]) -> str:
    before, after = section["before"], section["after"]
    rows = [
        ["end by themselves", f"{before['ended']:.0%}", f"{after['ended']:.0%}"],
        [f"repeat {RUN} tokens {TIMES} times or more", f"{before['repeats']:.0%}", f"{after['repeats']:.0%}"],
        ["tokens, mean", f"{before['tokens']:.0f}", f"{after['tokens']:.0f}"],
    ]
    head = f"{section['prompts']} greedy answers of at most {section['max_new_tokens']} tokens"
    return table([head, "base", "tuned"], rows)


def _facts(section: dict[str, Any]) -> str:
    columns = ("probes", "before", "after", "kept", "lost", "gained")
    rows = []
    for key, group in section["groups"].items():
        way, member = key.split("/")
        p_value = f"{group['p_value']:.3f}" if group["p_value"] >= 0.001 else f"{group['p_value']:.1e}"
        rows.append([f"{ASKED[way]}, {ASKED[member]}", *(f"{group[name]:,}" for name in columns), p_value])
    text = table(["facts", "asked", "base", "tuned", "kept", "lost", "gained", "McNemar p"], rows)
    for what, tell in (("lost", _lost), ("gained", _name)):
        for way in dict.fromkeys(row["way"] for row in section[what]):
            named = [tell(row) for row in section[what] if row["way"] == way]
            if named:
                more = f"; and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
                text += f"\n  {what}, {ASKED[way]}: {'; '.join(named[:MOST_NAMED])}{more}"
    return text


def _name(row: dict[str, Any]) -> str:
    return one_line(row["name"], 40)


def _lost(row: dict[str, Any]) -> str:
    return f"{_name(row)}, {one_line(row['answer'], 20)} -> {one_line(row['said'], 20) or 'nothing'}"


def _retained(section: dict[str, Any]) -> str:
    log, interval = section["log"], section["interval"]
    sure = f" ({LEVEL:.0%} interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    most, unit = "at most " if section["at_most"] else "", "steps" if log["unit"] == "step" else log["unit"]
    return (
        f"pretraining kept: {most}{section['share']:.1%}{sure} of its {unit}; by then its log ({log['loss']}) first "
        "stood no further above its end than the tuned model above the base"
    )
