"""Chats to token ids, each supervised or not: the only place that knows the chat format.

In comes a `Conversation`; out come spans of ids. The tokenizer's own template renders, people's text apart from its own
(`rendering.py`); the template's control strings become control tokens, and all other text goes through an encoder that
knows none (`encoding.py`). Supervised is what the model has to write: everything behind the generation header up to and
including the end of the turn (`turns.py`), in MiniMind all behind `<|im_start|>assistant\\n` including `<|im_end|>` and
the newline after it. Text is encoded apart on the two sides of every boundary, so what inference feeds (`prompt`) is an
exact prefix of what training saw, whatever the answer begins with.

All chats of one shape share a plan, so the work per chat is to fill it with texts and to encode these, many at once: 50
us in batches of 256, where `apply_chat_template`, a tokenizer call and a search for the spans take 480 us.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from tokenizers import Tokenizer

from minimind_sft.encoding import TextEncoder
from minimind_sft.formats import Conversation, Rejected
from minimind_sft.plans import Plan, PlannedSpan, dropped_fields, planned_items
from minimind_sft.rendering import Template
from minimind_sft.skeleton import CutError, Outline, Skeleton, Slot, Touched
from minimind_sft.turns import THOUGHT, UNTOLD, learn_turns, outside_turns, without_reasoning

CODE_VERSION = 3  # part of every cache key: raise it when the ids that come out change
# What stands before and behind a document of raw text. minimind2's files hold these markers themselves: there, and only
# there, a control string in the text is live.
DOCUMENT_FRAMES = {
    "minimind3": ("<|im_start|>", "<|im_end|>"),
    "minimind2": ("", ""),
    "qwen3": ("", "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "bare": ("", ""),
}
_MAX_PLANS = 4096


class Span(NamedTuple):
    """Consecutive tokens of a document.

    Attributes:
        ids: Token ids.
        supervised: Whether they are targets.
        optional: Whether they are an empty think block, which may be left out.
        ends_turn: Whether an assistant's turn, supervised or not, ends behind them.
    """

    ids: list[int]
    supervised: bool
    optional: bool = False
    ends_turn: bool = False


class ChatTemplate:
    """A tokenizer and its chat template.

    Attributes:
        tokenizer: The tokenizer as it was shipped; control strings in its input become control tokens.
        vocab_size: The largest id plus one.
        bos_id, eos_id: As the tokenizer's configuration names them; None where it names none.
        stop_ids: The ids at which generation ends.
        turns: How the template begins and ends the assistant's turns.
        fingerprint: SHA-256 over all that decides the ids that come out.
        dropped: How many chats lost what to the template so far, by role and field; a store keeps its own.
    """

    def __init__(self, specification: str, template: str, *, variables: dict[str, str]) -> None:
        self._made_of = specification, template, variables
        self.tokenizer = Tokenizer.from_str(specification)
        self.tokenizer.no_padding()  # as a tokenizer may have been saved
        self.tokenizer.no_truncation()
        parsed = json.loads(specification)
        self._controls = {token.content: id for id, token in self.tokenizer.get_added_tokens_decoder().items()}
        self._control = _control_pattern(parsed["added_tokens"])
        self._encoder = TextEncoder(parsed, controls=self._controls)
        self._template = Template(template, controls=self._controls, variables=variables)
        self._knows_reasoning = THOUGHT in template
        self._plans: dict[Any, Plan] = {}
        self.dropped: Counter[str] = Counter()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id = (self._controls.get(variables.get(name, "")) for name in ("bos_token", "eos_token"))
        known = json.dumps([specification, template, variables, CODE_VERSION])
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()
        self.turns = learn_turns(self._template, self._control)
        stops = [self._controls[match["token"]] for match in self._control.finditer(self.turns.end)][:1]
        self.stop_ids = tuple(dict.fromkeys(stops + ([] if self.eos_id is None else [self.eos_id])))

    @classmethod
    def from_folder(cls, folder: Path | str) -> ChatTemplate:
        """Read a tokenizer folder: tokenizer.json, tokenizer_config.json, and chat_template.jinja where there is one.

        Raises:
            ValueError: The folder has no tokenizer or no chat template, or one that cannot be used.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json; data.tokenizer must name a folder that holds it and "
                             "tokenizer_config.json, as save_pretrained writes them")
        config = _read_config(folder / "tokenizer_config.json")
        template = _template_source(folder, config)
        values = {name: value["content"] if isinstance(value, dict) else value
                  for name, value in config.items() if name.endswith("_token")}
        try:
            made = cls(file.read_text(encoding="utf-8"), template,
                       variables={name: value for name, value in values.items() if isinstance(value, str)})
            for token in config.get("added_tokens_decoder", {}).values():
                if token["content"] not in made._controls:
                    raise ValueError(f"tokenizer_config.json adds {token['content']!r}, which tokenizer.json lacks; "
                                     "load the tokenizer with transformers and save it again")
            return made
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        except Exception as error:  # the tokenizers library raises nothing more particular
            if type(error) is not Exception:
                raise
            raise ValueError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: what it was made of."""
        specification, template, variables = self._made_of
        return partial(ChatTemplate, variables=variables), (specification, template)

    # ---- the rest of the program's interface

    def render(self, conversation: Conversation, *, supervise: str = "all", reasoning: bool = True) -> list[Span]:
        """The spans of one conversation; see `render_many`."""
        return self.render_many([conversation], supervise=supervise, reasoning=reasoning)[0]

    def render_many(
        self, conversations: Iterable[Conversation], *, supervise: str = "all", reasoning: bool = True
    ) -> list[list[Span]]:
        """The spans of each conversation, in order; concatenated, their ids are the conversation's.

        Args:
            conversations: From `formats.parse`. A message with `train` false is context.
            supervise: `all` assistant turns, or the `last`.
            reasoning: Supervise think blocks, too; else they are context, empty ones as well.

        Raises:
            Rejected: The template refuses a conversation (`template_refused`, `template_cuts_text`), or an answer holds
                a think block that it does not part from the rest, and `reasoning` is false (`reasoning_in_answer`).
        """
        spans = []
        for found in self.render_each(conversations, supervise=supervise, reasoning=reasoning):
            if isinstance(found, Rejected):
                raise found
            spans.append(found)
        return spans

    def render_each(
        self, conversations: Iterable[Conversation], *, supervise: str = "all", reasoning: bool = True
    ) -> list[list[Span] | Rejected]:
        """`render_many`, with the reason in the place of the spans where a conversation is refused."""
        plans: list[Plan | Rejected] = []
        texts: list[str] = []
        for conversation in conversations:
            try:
                plan, slots = self._plan(conversation.messages, conversation.tools, supervise=supervise,
                                         reasoning=reasoning)
                if not reasoning:
                    _refuse_thoughts(plan, slots)
            except Rejected as why:
                plans.append(why)
                continue
            if plan.dropped:
                self.dropped.update(plan.dropped)
            plans.append(plan)
            texts += plan.texts(slots)
        encoded = iter(self._encoder.encode_many(texts))
        return [plan if isinstance(plan, Rejected) else
                [Span(span.ids(encoded), span.supervised, span.optional, span.ends_turn) for span in plan.spans]
                for plan in plans]

    def require_reasoning(self) -> None:
        """Raises ValueError where the template knows no think blocks, so that none can be told from an answer."""
        if not self._knows_reasoning:
            raise ValueError(f"data.supervise_reasoning is false, but the chat template knows no {THOUGHT}, so that "
                             "reasoning cannot be told from answers; set it to true, or use a template that does")

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, thinking: bool = False
    ) -> list[int]:
        """What inference feeds: the messages and the header of the answer to come."""
        flags = {"add_generation_prompt": True} | {flag: thinking for flag in self.turns.flags}
        plan, slots = self._plan(messages, tools, flags=flags)
        encoded = iter(self._encoder.encode_many(list(plan.texts(slots))))
        return [id for span in plan.spans for id in span.ids(encoded)]

    def around_user(self) -> tuple[list[int], list[int]]:
        """The ids before and behind what a user says, up to where the answer begins: all that two prompts have in
        common, as a letter may become one token with the space before it.

        Raises:
            ValueError: The template puts nothing before it.
        """
        one, other = (self.prompt([{"role": "user", "content": said}]) for said in "0A")
        before = _in_common(one, other)
        if not before:
            raise ValueError("the chat template puts nothing before what a user says")
        return one[:before], one[len(one) - _in_common(one[::-1], other[::-1]) :]

    def document(self, text: str, *, format: str) -> list[Span]:
        """The spans of one raw text; see `documents`."""
        return self.documents([text], format=format)[0]

    def documents(self, texts: list[str], *, format: str) -> list[list[Span]]:
        """Raw texts as a family's pretraining framed them; all is supervised save the first token, which has no past.

        Args:
            texts: The documents.
            format: One of `DOCUMENT_FRAMES`. `minimind2` texts hold the markers themselves, and they are live; `bare`
                is the text alone.
        """
        if format not in DOCUMENT_FRAMES:
            raise ValueError(f"data.document_format {format!r} is not known; choose from {', '.join(DOCUMENT_FRAMES)}")
        frame = [token for token in DOCUMENT_FRAMES[format] if token]
        if missing := [token for token in frame if token not in self._controls]:
            raise ValueError(f"data.document_format {format!r} needs {missing[0]}, which this tokenizer does not have; "
                             f"set it to one of {', '.join(DOCUMENT_FRAMES)}: how the base's pretraining framed a text")
        first, last = ([self._controls[token]] if token else [] for token in DOCUMENT_FRAMES[format])
        if format == "minimind2":
            encoded = [entry.ids for entry in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            encoded = self._encoder.encode_many(texts)
        rows = [(first, ids, last) if first else (ids[:1], ids[1:], last) for ids in encoded]
        return [[Span(list(ids), number > 0) for number, ids in enumerate(row) if ids] for row in rows]

    def encode_text(self, text: str) -> list[int]:
        """The ids of people's text: no string in it is a control token."""
        return self._encoder.encode(text)

    @property
    def control_ids(self) -> list[int]:
        """The ids of all control tokens, ascending."""
        return sorted(self._controls.values())

    def token_id(self, control: str) -> int | None:
        """The id of a control token, or None where there is no such token."""
        return self._controls.get(control)

    def opening_id(self, format: str, vocab_size: int) -> int | None:
        """The id of the token behind which a model of so many tokens writes a document: what frames one, or else begins
        or ends a text; None where there is no such token."""
        first, last = (self.token_id(token) for token in DOCUMENT_FRAMES[format])
        known = (id for id in (first, self.bos_id, last, self.eos_id) if id is not None)
        return next((id for id in known if id < vocab_size), None)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    # ---- plans

    def _plan(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, supervise: str = "all",
              reasoning: bool = True, flags: dict[str, Any] | None = None) -> tuple[Plan, list[Slot]]:
        context = [index for index, message in enumerate(messages) if not message.get("train", True)]
        if supervise == "last":
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            context = sorted({*context, *answers[:-1]})
        flags = flags or {"add_generation_prompt": False}
        try:
            outline, slots = self._template.outline(messages, tools)
        except CutError as error:
            raise Rejected("template_cuts_text", str(error)) from None
        key = (outline, tuple(context), reasoning, tuple(flags.values()))
        plan = self._plans.get(key)
        if plan is None:
            try:
                skeleton = self._template.skeleton(outline, flags)
            except Touched:
                return self._plan(messages, tools, supervise=supervise, reasoning=reasoning, flags=flags)
            except jinja2.TemplateError as error:
                raise Rejected("template_refused", f"the chat template says: {error}") from None
            except CutError as error:
                raise Rejected("template_cuts_text", str(error)) from None
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._compile(skeleton, outline, slots, context, reasoning)
        return plan, slots

    def _compile(self, skeleton: Skeleton, outline: Outline, slots: list[Slot], context: list[int],
                 reasoning: bool) -> Plan:
        roles = [message[0] for message in outline[1:]]
        answers = [index for index, role in enumerate(roles) if role == "assistant"]
        spans = []
        segments = self.turns.cut(skeleton, slots, answers)
        dropped = dropped_fields(skeleton, slots, roles) + outside_turns(segments, skeleton, slots, answers)
        if not reasoning:
            segments = without_reasoning(segments, skeleton, self._control)
        for segment in segments:
            items = planned_items(segment.text, skeleton, control=self._control, ids=self._controls,
                                  encode=self.encode_text)
            unclear = segment.message == UNTOLD and bool(context)  # it may be one that is not to be learned
            supervised = segment.message is not None and segment.message not in context and not unclear
            spans.append(PlannedSpan(supervised, segment.optional, segment.ends_turn, items))
        return Plan(spans, dropped)


def _refuse_thoughts(plan: Plan, slots: list[Slot]) -> None:
    """Raises `Rejected` where what is to be learned holds the end of a think block, as text."""
    for span in plan.spans:
        if span.supervised and any(THOUGHT in text for text in span.texts(slots)):
            raise Rejected("reasoning_in_answer", f"an answer holds {THOUGHT}, which this chat template does not part "
                           "from it, and data.supervise_reasoning is false; put the reasoning into reasoning_content")


def _in_common(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _control_pattern(tokens: list[dict[str, Any]]) -> re.Pattern[str]:
    """Matches a control string with the white space that its token swallows; the string is the group `token`."""
    texts = {side: sorted((re.escape(token["content"]) for token in tokens if side == "all" or token.get(side)),
                          key=len, reverse=True) or ["(?!)"] for side in ("all", "lstrip", "rstrip")}
    before, after = "|".join(texts["lstrip"]), "|".join(f"(?<={text})" for text in texts["rstrip"])
    return re.compile(rf"(?:\s+(?={before}))?(?P<token>{'|'.join(texts['all'])})(?:(?:{after})\s+)?")


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str) or not template:
        raise ValueError(f"{folder} has no chat template; put one into tokenizer_config.json (chat_template) or "
                         "chat_template.jinja: often a base model's tokenizer lacks it and its chat model's has it")
    return template
