"""Fact probes: does the model still know what it knew, asked as raw text and asked as a chat?

A probe is a line of JSON: `prompt` (raw text that the answer continues), `answer`, and optionally `question` (the same
as a user would ask it, without which the prompt is asked), `name` and `in_sft` (whether the training chats contain the
fact). Both ways are answered greedily. Raw counts when the continuation begins with the answer, a chat when its reply
contains it. With `distractors`, a list of wrong answers, the model also chooses, both ways: right is where it finds the
answer likelier than any of them, by the sum of its tokens' log-probabilities. A choice tells of knowledge that is too
faint to be said, and of its loss.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimind_sft.chat import DOCUMENT_FRAMES, ChatTemplate
from minimind_sft.generate import generate
from minimind_sft.model import Transformer
from minimind_sft.sampling import read_lines
from minimind_sft.scoring import losses
from minimind_sft.strict_json import Rejected, load

RAW_EXTRA, CHAT_TOKENS = 4, 48  # tokens beyond the answer's own; tokens of a chat reply


_NUMBER_GOES_ON = re.compile(r"\d(\|[.,]|[.,]\|)\d")
WAYS = ("raw", "chat", "raw_choice", "chat_choice")  # of asking


@dataclass(frozen=True)
class Probe:
    prompt: str
    question: str
    answer: str
    name: str
    in_sft: bool
    distractors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What the model said to one probe, or chose, and whether that was right."""

    raw: str
    raw_right: bool
    chat: str
    chat_right: bool
    raw_choice: str = ""
    raw_choice_right: bool = False
    chat_choice: str = ""
    chat_choice_right: bool = False


def load_probes(paths: Sequence[Path]) -> list[Probe]:
    """Read probes, from any files that chats may come from.

    Raises:
        ValueError: naming file, line and what is missing, or where the same was asked before.
    """
    asked: dict[Probe, str] = {}
    for line in read_lines(paths):
        where = f"{line.file}:{line.number}"
        try:
            probe = _probe(load(line.text))
        except (ValueError, AttributeError, Rejected) as error:
            raise ValueError(
                f"{where}: not a probe ({type(error).__name__}: {error}); a line is an object with prompt and answer, "
                "and question where a user would ask otherwise"
            ) from error
        if probe in asked:
            raise ValueError(f"{where}: the probe of {asked[probe]} again, to be counted twice; leave one of them out")
        asked[probe] = where
    if not asked:
        raise ValueError(f"{' and '.join(map(str, paths))} holds no probe")
    return list(asked)


def _probe(row: dict[str, Any]) -> Probe:
    fields = {"question": row.get("prompt")} | {name: value for name, value in row.items() if value is not None}
    texts = {name: fields.get(name) for name in ("prompt", "question", "answer")}
    if wrong := [name for name, value in texts.items() if not (isinstance(value, str) and value.strip())]:
        raise ValueError(f"no text as {' and '.join(wrong)}")
    prompt, question, answer = map(str, texts.values())
    others = fields.get("distractors", [])
    if not (isinstance(others, list) and all(isinstance(other, str) and other.strip() for other in others)):
        raise ValueError(f"distractors are {others!r}, not a list of texts")
    answer, distractors = answer.strip(), tuple(other.strip() for other in others)
    if answer in distractors:
        raise ValueError(f"the answer {answer!r} is among its distractors")
    return Probe(prompt, question, answer, str(fields.get("name", prompt)), bool(row.get("in_sft", False)), distractors)


def ask(model: Transformer, template: ChatTemplate, probes: Sequence[Probe], *, document_format: str) -> list[Reply]:
    """Ask every probe in all ways."""
    raw_prompts = [_raw(template, probe.prompt, document_format) for probe in probes]
    chat_prompts = [template.prompt([{"role": "user", "content": probe.question}]) for probe in probes]
    longest = max(len(template.encode_text(probe.answer)) for probe in probes)
    raw = generate(model, raw_prompts, max_new_tokens=longest + RAW_EXTRA, stop_ids=template.stop_ids)
    chat = generate(model, chat_prompts, max_new_tokens=CHAT_TOKENS, stop_ids=template.stop_ids)
    raw_chosen, chat_chosen = _choose(model, template, probes, raw_prompts, chat_prompts, document_format)
    replies = []
    for probe, raw_ids, chat_ids, one, other in zip(probes, raw, chat, raw_chosen, chat_chosen, strict=True):
        said, reply = answer_text(template, raw_ids), answer_text(template, chat_ids)
        right = begins_with(said, probe.answer), contains(reply, probe.answer)
        chosen = (one, one == probe.answer, other, other == probe.answer)
        replies.append(Reply(said, right[0], reply, right[1], *chosen))
    return replies


def _choose(
    model: Transformer,
    template: ChatTemplate,
    probes: Sequence[Probe],
    raw_prompts: list[list[int]],
    chat_prompts: list[list[int]],
    document_format: str,
) -> tuple[list[str], list[str]]:
    """The likeliest choice of every probe behind its prompt, in raw text and in a chat; empty where there is none."""
    choices = [[probe.answer, *probe.distractors] if probe.distractors else [] for probe in probes]
    raw = [
        [_raw(template, f"{probe.prompt}{_space(probe.prompt)}{text}", document_format) for text in texts]
        for probe, texts in zip(probes, choices, strict=True)
    ]
    chat = [
        [prompt + template.encode_text(text) for text in texts]
        for prompt, texts in zip(chat_prompts, choices, strict=True)
    ]
    raw_chosen, chat_chosen = (
        [texts[place] if texts else "" for texts, place in zip(choices, places, strict=True)]
        for places in (_likeliest(model, raw_prompts, raw), _likeliest(model, chat_prompts, chat))
    )
    return raw_chosen, chat_chosen


def _raw(template: ChatTemplate, text: str, document_format: str) -> list[int]:
    """A document that is not at its end."""
    ends = {*template.stop_ids, template.token_id(DOCUMENT_FRAMES[document_format][1])}  # behind them, a new one begins
    ids = [id for span in template.document(text, format=document_format) for id in span.ids]
    return ids[:-1] if ids[-1] in ends else ids


def _space(prompt: str) -> str:
    """What stands between a prompt and its answer: nothing in Chinese, nor where there is one already."""
    return "" if prompt[-1].isspace() or _without_spaces(prompt[-1]) else " "


def _without_spaces(character: str) -> bool:
    """Whether it is of a script that puts nothing between words: Chinese and Japanese, but not Korean."""
    return unicodedata.east_asian_width(character) in "WF" and "HANGUL" not in unicodedata.name(character, "")


def _likeliest(model: Transformer, prompts: list[list[int]], candidates: list[list[list[int]]]) -> list[int]:
    """For every prompt the place of its likeliest candidate, prompts that go on; of several the last, so that a model
    which finds all alike, or is broken, knows nothing. Scored is what does not stand in the prompt and all candidates.
    """
    rows = []
    for prompt, those in zip(prompts, candidates, strict=True):
        shared = len(os.path.commonprefix([prompt, *those]))  # of lists as well as of paths
        rows += [(np.array(ids), np.arange(len(ids)) >= shared) for ids in those]
    nats = iter(np.nan_to_num(losses(model, rows)[1], nan=np.inf).tolist() if rows else [])
    found = []
    for those in candidates:
        scores = [next(nats) for _ in those]
        found.append(min(range(len(those)), key=lambda place: (scores[place], -place), default=0))
    return found


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
        if not _goes_on(answer, after) and not _goes_on(before, answer):
            return True
        start = reply.find(answer, start + 1)
    return False


def _goes_on(left: str, right: str) -> bool:
    """Whether a word or number goes on from one text to the next: 3|5, 3|.5 and 3,|500 do, 3|. and 3|, 5 do not."""
    if not left or not right:
        return False
    if _word(left[-1]) and _word(right[0]):
        return True
    return bool(_NUMBER_GOES_ON.search(f"{left[-2:]}|{right[:2]}"))


def _word(character: str) -> bool:
    return character.isalnum() and not _without_spaces(character)  # there, any neighbour will do


def compare(probes: Sequence[Probe], before: Sequence[Reply], after: Sequence[Reply]) -> dict[str, Any]:
    """Counts of kept, lost and gained facts, and the losses by name; what `probes.json` holds.

    Returns:
        `groups`: for each of `WAYS` that was asked, `in_sft` and `not_in_sft`: `probes`, `before`, `after`, `kept`,
        `lost`, `gained`; `lost` and `gained`: rows with `name`, `way`, `in_sft`, `answer`, `said`; `replies`: all.
    """
    groups: dict[str, dict[str, Any]] = {}
    lost, gained = [], []
    for way in WAYS:
        for member in (False, True):
            rows = [
                (probe, getattr(old, f"{way}_right"), getattr(new, f"{way}_right"), getattr(new, way))
                for probe, old, new in zip(probes, before, after, strict=True)
                if probe.in_sft is member and (probe.distractors or "choice" not in way)
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
