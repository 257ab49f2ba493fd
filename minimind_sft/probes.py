"""Fact probes: does the model still know what it knew, asked as raw text and asked as a chat?

A probe is a line of JSON: `prompt` (raw text that the answer continues), `question` (the same as a user would ask
it), `answer`, and optionally `name` and `in_sft` (whether the training chats contain the fact). Both ways are
answered greedily. Raw counts when the continuation begins with the answer, a chat when its reply contains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minimind_sft.chat import ChatTemplate
from minimind_sft.generate import generate
from minimind_sft.model import Transformer
from minimind_sft.sampling import read_lines
from minimind_sft.strict_json import Rejected, load

RAW_EXTRA, CHAT_TOKENS = 4, 48  # tokens beyond the answer's own; tokens of a chat reply


@dataclass(frozen=True)
class Probe:
    prompt: str
    question: str
    answer: str
    name: str
    in_sft: bool


@dataclass(frozen=True)
class Reply:
    """What the model said to one probe, and whether that was right."""

    raw: str
    raw_right: bool
    chat: str
    chat_right: bool


def load_probes(path: Path) -> list[Probe]:
    """Read probes, from any file that chats may come from.

    Raises:
        ValueError: naming file, line and what is missing.
    """
    probes = []
    for line in read_lines([path]):
        try:
            row = load(line.text)
            fields = {name: row.get(name) for name in ("prompt", "question", "answer")}
            if wrong := [name for name, value in fields.items() if not (isinstance(value, str) and value)]:
                raise ValueError(f"no text as {' and '.join(wrong)}")
            prompt, question, answer = fields.values()
            name, in_sft = str(row.get("name", prompt)), bool(row.get("in_sft", False))
            probes.append(Probe(prompt, question, answer, name, in_sft))
        except (ValueError, KeyError, TypeError, Rejected) as error:
            raise ValueError(
                f"{path}:{line.number}: not a probe ({type(error).__name__}: {error}); a line is an object with "
                "prompt, question and answer"
            ) from error
    if not probes:
        raise ValueError(f"{path} holds no probe")
    return probes


def ask(model: Transformer, template: ChatTemplate, probes: Sequence[Probe], *, document_format: str) -> list[Reply]:
    """Ask every probe both ways, greedily."""
    raw_prompts = []
    for probe in probes:
        ids = [id for span in template.document(probe.prompt, format=document_format) for id in span.ids]
        raw_prompts.append(ids[:-1] if ids[-1] in template.stop_ids else ids)
    longest = max(len(template.encode_text(probe.answer)) for probe in probes)
    chat_prompts = [template.prompt([{"role": "user", "content": probe.question}]) for probe in probes]
    raw = generate(model, raw_prompts, max_new_tokens=longest + RAW_EXTRA, stop_ids=template.stop_ids)
    chat = generate(model, chat_prompts, max_new_tokens=CHAT_TOKENS, stop_ids=template.stop_ids)
    replies = []
    for probe, raw_ids, chat_ids in zip(probes, raw, chat, strict=True):
        said, reply = answer_text(template, raw_ids), answer_text(template, chat_ids)
        replies.append(Reply(said, begins_with(said, probe.answer), reply, contains(reply, probe.answer)))
    return replies


def answer_text(template: ChatTemplate, ids: list[int]) -> str:
    """The text of generated ids without the token that ended them."""
    return template.decode([id for id in ids if id not in template.stop_ids]).strip()


def begins_with(said: str, answer: str) -> bool:
    """Whether a continuation begins with the answer, and not with a longer word or number that the answer begins."""
    return said.startswith(answer) and not _goes_on(answer, said[len(answer) :])


def contains(reply: str, answer: str) -> bool:
    """Whether a reply holds the answer as whole words."""
    start = reply.find(answer)
    while start >= 0:
        before, after = reply[:start], reply[start + len(answer) :]
        if not _goes_on(answer, after) and not (before and _word(before[-1]) and _word(answer[0])):
            return True
        start = reply.find(answer, start + 1)
    return False


def _goes_on(answer: str, rest: str) -> bool:
    return bool(rest) and _word(answer[-1]) and _word(rest[0])


def _word(character: str) -> bool:
    return character.isascii() and character.isalnum()  # Chinese is written without spaces: any neighbour will do


def compare(probes: Sequence[Probe], before: Sequence[Reply], after: Sequence[Reply]) -> dict[str, Any]:
    """Counts of kept, lost and gained facts, and the losses by name; what `probes.json` holds.

    Returns:
        `groups`: for `raw` and `chat`, `in_sft` and `not_in_sft`: `probes`, `before`, `after`, `kept`, `lost`,
        `gained`; `lost` and `gained`: rows with `name`, `way`, `in_sft`, `answer`, `said`; `replies`: all of them.
    """
    groups: dict[str, dict[str, Any]] = {}
    lost, gained = [], []
    for way in ("raw", "chat"):
        for member in (False, True):
            rows = [
                (probe, getattr(old, f"{way}_right"), getattr(new, f"{way}_right"), getattr(new, way))
                for probe, old, new in zip(probes, before, after, strict=True)
                if probe.in_sft is member
            ]
            if not rows:
                continue
            groups[f"{way}/{'in_sft' if member else 'not_in_sft'}"] = {
                "probes": len(rows),
                "before": sum(old for _, old, _, _ in rows),
                "after": sum(new for _, _, new, _ in rows),
                "kept": sum(old and new for _, old, new, _ in rows),
                "lost": sum(old and not new for _, old, new, _ in rows),
                "gained": sum(new and not old for _, old, new, _ in rows),
            }
            for probe, old, new, said in rows:
                row = {"name": probe.name, "way": way, "in_sft": member, "answer": probe.answer, "said": said}
                if old and not new:
                    lost.append(row)
                elif new and not old:
                    gained.append(row)
    replies = [
        {"name": probe.name, "before": asdict(old), "after": asdict(new)}
        for probe, old, new in zip(probes, before, after, strict=True)
    ]
    return {"groups": groups, "lost": lost, "gained": gained, "replies": replies}
