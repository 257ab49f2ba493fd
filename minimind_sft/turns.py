"""Where the assistant's turns lie in a rendered chat, learned from the template itself.

A template says how an answer begins (its generation prompt, the *header*) and how it ends, if one renders a probe. A
turn's span is what lies behind a header up to and including the next end. Both are looked for in the template's own
text, where everything that people wrote is a slot, so nobody opens or closes a span by typing. A template with
`{% generation %}` markers is taken at its word instead.

Behind the header a prompt may go on (`<think>\\n`, or an empty think block, which is then the *optional* part of an
answer). Text is cut there too, so that a prompt is a prefix of what was trained, token by token.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any, NamedTuple

import jinja2

from minimind_sft.rendering import Template
from minimind_sft.sandbox import BEGIN, END
from minimind_sft.skeleton import MARK, OPEN, TAG_OPEN, Skeleton, Slot, Touched

THINKING_FLAGS = ("enable_thinking", "open_thinking", "thinking")
THOUGHT = "</think>"
UNTOLD = -1  # an assistant's turn of a message that cannot be told
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")

# Chats that a template has to render in slots as it does in the open.
_TEXT = " \n He said: {\"a\": '<b>&</b>'}\n\n\tÜber 12 % — 你好，世界。\\n " * 3
_SYSTEM, _USER = {"role": "system", "content": _TEXT}, {"role": "user", "content": _TEXT}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, _TEXT]}}}
_TOOL = {"type": "function", "function": {"name": "f", "description": _TEXT, "parameters": {"type": "object"}}}
_Probe = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
_PROBES: list[_Probe] = [
    ([_USER, {"role": "assistant", "content": _TEXT}] * 2, None),
    ([_SYSTEM, _USER, {"role": "assistant", "content": _TEXT, "reasoning_content": _TEXT}], None),
    ([_USER, {"role": "assistant", "content": f"<think>\n{_TEXT}\n</think>\n\n{_TEXT}"}] * 2, None),
]
_TOOL_PROBE: _Probe = (
    [_SYSTEM, _USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "content": _TEXT},
     {"role": "assistant", "content": _TEXT}], [_TOOL])


class Segment(NamedTuple):
    """A stretch of marked text.

    Attributes:
        text: The stretch.
        message: The assistant message whose turn it is part of, or `UNTOLD`; None between turns.
        optional: Whether it is an empty think block.
        ends_turn: Whether the turn ends behind it.
    """

    text: str
    message: int | None
    optional: bool = False
    ends_turn: bool = False


class Turns(NamedTuple):
    """How a template begins and ends the assistant's turns.

    Attributes:
        header: What stands before an answer, such as `<|im_start|>assistant\\n`.
        end: What stands behind it, such as `<|im_end|>\\n`.
        tails: What a prompt may hold behind the header, the longest first.
        blocks: Those of them that are an empty think block.
        flags: The names under which the template asks whether to think.
        control: Matches a control string, as the group `token`.
    """

    header: str
    end: str
    tails: list[str]
    blocks: set[str]
    flags: list[str]
    control: re.Pattern[str]

    def cut(self, skeleton: Skeleton, slots: list[Slot], answers: list[int]) -> list[Segment]:
        """Cut a skeleton at the boundaries of turns, and within turns where a prompt may end.

        Args:
            skeleton: The rendered chat.
            slots: Its slots, which tell whose text is where; only their messages matter.
            answers: The indices of the assistant's messages.
        """
        text, turns = self._find(skeleton, slots, answers)
        segments, position = [], 0
        for number, (start, end) in enumerate(turns):
            mark = next((mark for mark in MARK.finditer(text, start, end) if mark[1] == OPEN), None)
            message = slots[int(mark[2])].message if mark else answers[number] if len(turns) == len(answers) else UNTOLD
            header = text.find(self.header, max(0, start - len(self.header)), start + len(self.header))
            asked = start if header < 0 else header + len(self.header)  # behind `start` where a marker stands too early
            head = self._tail(text, asked)
            turn = [
                Segment(text[start:asked], message),
                Segment(text[asked : asked + len(head)], message, head in self.blocks),
                Segment(text[asked + len(head) : end], message),
            ]
            turn = [segment for segment in turn if segment.text]
            ending = [segment._replace(ends_turn=True) for segment in turn[-1:]]
            segments += [Segment(text[position:start], None), *turn[:-1], *ending]
            position = end
        return [segment for segment in [*segments, Segment(text[position:], None)] if segment.text]

    def _tail(self, text: str, position: int) -> str:
        return next((tail for tail in self.tails if text.startswith(tail, position)), "")

    def _find(self, skeleton: Skeleton, slots: list[Slot], answers: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """The skeleton's text without BEGIN and END, and where the turns lie in it."""
        text = skeleton.text
        if BEGIN in text:
            parts = re.split(f"[{BEGIN}{END}]", text)
            edges = list(accumulate(map(len, parts)))
            return "".join(parts), [(edges[i], edges[i + 1]) for i in range(0, len(parts) - 1, 2)]
        turns, position = [], 0
        while (found := text.find(self.header, position)) >= 0:
            start = found + len(self.header)
            written = start + len(self._tail(text, start))
            following = text.find(self.header, start)
            limit = len(text) if following < 0 else following
            for mark in MARK.finditer(text, start, limit):
                slot = skeleton.slot_of(mark)
                if slot is not None and slots[slot].message not in answers:
                    limit = mark.start()  # someone else's text
                    break
                written = mark.end()
            found = text.find(self.end, start, limit)
            position = self._stop(text, written, limit) if found < 0 else found + len(self.end)
            turns.append((start, position))
        return text, turns

    def _stop(self, text: str, written: int, limit: int) -> int:
        """Where a turn ends that lacks the usual end: behind the next control string, if it begins nothing new."""
        begins = self.control.search(self.header)
        stop = self.control.search(text, written, limit)
        if stop is None:
            return written
        return stop.start("token") if begins and stop["token"] == begins["token"] else stop.end("token")


def outside_turns(segments: list[Segment], skeleton: Skeleton, slots: list[Slot], answers: list[int]) -> list[str]:
    """The assistant's fields that stand in no turn, and so are not learned, each as role and field."""
    inside: set[int | None] = set()
    outside: set[int | None] = set()
    for segment in segments:
        found = {skeleton.slot_of(mark) for mark in MARK.finditer(segment.text)}
        (outside if segment.message is None else inside).update(found)
    lost = {number for number in outside - inside if number is not None and slots[number].message in answers}
    return [f"assistant {field} outside its turn" for field in sorted({slots[number].field for number in lost})]


def without_reasoning(segments: list[Segment], skeleton: Skeleton, control: re.Pattern[str]) -> list[Segment]:
    """Cut every turn behind its last think block, and make what lies before the cut no part of the answer.

    Args:
        segments: From `Turns.cut`.
        skeleton: That they were cut from.
        control: Matches a control string, as the group `token`, with the white space that it swallows. Where the end of
            a think block is one, the cut changes no ids.
    """
    made: list[Segment] = []
    begin = 0  # of the turn, in `made`
    for segment in segments:
        stop = 0
        if segment.message is not None:  # an empty think block is all thought
            stop = len(segment.text) if segment.optional else _end_of_thought(segment.text, skeleton, control)
        if stop:
            made[begin:] = [part._replace(message=None) for part in made[begin:]]
            rest = segment._replace(text=segment.text[stop:])
            thought = segment._replace(text=segment.text[:stop], message=None)
            made += [thought._replace(ends_turn=False), rest] if rest.text else [thought]
        else:
            made.append(segment)
        if segment.ends_turn or segment.message is None:
            begin = len(made)
    return made


def _end_of_thought(text: str, skeleton: Skeleton, control: re.Pattern[str]) -> int:
    """Where in marked text the last think block is over; 0 where there is none."""
    ends = [match.end() for match in control.finditer(text) if match["token"] == THOUGHT]
    if not ends:
        ends = [match.end() for match in re.finditer(re.escape(THOUGHT), text)]
    tags = [mark for mark in MARK.finditer(text) if mark[1] == TAG_OPEN]
    return max([0, *ends, *(mark.end() for mark in tags if skeleton.tags[int(mark[2])] == THOUGHT)])


def learn_turns(template: Template, control: re.Pattern[str]) -> Turns:
    """Find out how a template begins and ends turns.

    Args:
        template: The template.
        control: Matches a control string, as the group `token`.

    Raises:
        ValueError: The template changes what people wrote, or does not begin and end turns in a way that can be found.
    """
    if not _is_faithful(template, _PROBES):
        template.widen()
        if not _is_faithful(template, _PROBES):
            raise ValueError("the chat template changes the text of messages, beyond stripping white space off it and "
                             "splitting it, so that no one can tell whose it is; use one that does not")
    template.changes_tools = not _is_faithful(template, [_TOOL_PROBE])
    probe = [{"role": role, "content": f"probe {number}"}
             for number, role in enumerate(("user", "assistant", "user", "assistant"))]
    text = _render(template, probe, {})
    marks = list(MARK.finditer(text))
    if [int(mark[2]) for mark in marks] != [0, 1, 2, 3]:
        raise ValueError("the chat template does not render two questions and two answers in order")
    between, lead = text[marks[1].end() : marks[2].start()], text[marks[2].end() : marks[3].start()]
    end = _common_prefix([between, text[marks[3].end() :]], control)
    if not control.search(end):
        raise ValueError("the chat template does not end the assistant's turns with a control token, so nothing would "
                         f"teach the model to stop (behind an answer it writes {between!r}); add eos_token to it")
    flags = sorted(template.undeclared.intersection(THINKING_FLAGS))
    prompts = []
    for value in (True, False):
        asked = _render(template, probe[:1], dict.fromkeys(flags, value))
        prompt = _render(template, probe[:1], {"add_generation_prompt": True} | dict.fromkeys(flags, value))
        prompts.append(prompt.removeprefix(_common_prefix([asked, prompt], control)))
    header = (_common_prefix(prompts, control) or lead).split("<think>")[0].removeprefix(end)
    if not header or header not in lead:
        raise ValueError(f"the chat template's generation prompt {prompts[1]!r} is not how answers begin ({lead!r})")
    tails = {prompt.removeprefix(header) for prompt in prompts if prompt} | {lead.split(header)[-1]}
    blocks = {tail for tail in tails if _EMPTY_THINK.fullmatch(tail)}
    return Turns(header, end, sorted(filter(None, tails), key=len, reverse=True), blocks, flags, control)


def _is_faithful(template: Template, probes: list[_Probe]) -> bool:
    """Whether some chats, rendered in slots and filled in, are what the template makes of them in the open."""
    flags = {"add_generation_prompt": False}
    for messages, tools in probes:
        try:
            plain = template.plain(messages, tools, flags)
        except jinja2.TemplateError:
            continue  # not every template takes tools or a system prompt
        outline, slots = template.outline(messages, tools)
        try:
            skeleton = template.skeleton(outline, flags)
        except Touched:
            outline, slots = template.outline(messages, tools)
            skeleton = template.skeleton(outline, flags)
        if skeleton.filled(slots) != plain:
            return False
    return True


def _render(template: Template, messages: list[dict[str, Any]], flags: dict[str, Any]) -> str:
    outline, _ = template.outline(messages, None)
    try:
        text = template.skeleton(outline, {"add_generation_prompt": False} | flags).text
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses a question and an answer: {error}") from None
    return re.sub(f"[{BEGIN}{END}]", "", text)


def _common_prefix(texts: list[str], control: re.Pattern[str]) -> str:
    """What all texts begin with, no control string cut in two."""
    first, last = min(texts), max(texts)
    same = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    whole = (match.span("token") for match in control.finditer(first))
    return first[: next((start for start, end in whole if start < same < end), same)]
