"""A conversation with a model: a message in, the answer out piece by piece, in whole characters.

Every answer is prompted with what the chat template makes of all messages so far, exactly as training saw them; the
cache (`continuation.py`) makes that cost only what is new. What the model wrote goes back in as people's text does, so
nothing it says becomes a control token of a later prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from minimind_sft.chat import DOCUMENT_FRAMES, ChatTemplate
from minimind_sft.continuation import Continuation
from minimind_sft.formats import Rejected
from minimind_sft.generate import Sampling
from minimind_sft.model import Transformer

_INCOMPLETE = "\ufffd"  # what a decoder makes of the first bytes of a character


class Dialogue:
    """Messages so far, and the model that answers them.

    Args:
        model: on any device.
        template: tokenizer and chat template.
        sampling: how tokens are chosen; every answer of a session has its own random numbers.
        max_new_tokens: length of an answer at most.
        system: the system prompt; None for none.

    Attributes:
        messages: the conversation, the answers included.
        cut: whether the last answer ended at `max_new_tokens`.
    """

    def __init__(
        self,
        model: Transformer,
        template: ChatTemplate,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        system: str | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; an answer has at least 1 token")
        self.template, self.sampling, self.max_new_tokens = template, sampling, max_new_tokens
        self.text = Continuation(model)
        self.cut = False
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._answers = 0
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, but not the system prompt."""
        self.messages: list[dict[str, Any]] = list(self._system)

    def ask(self, message: str) -> Generator[str, None, None]:
        """Yield the answer; also what was said until somebody stops reading becomes part of the conversation.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        try:
            prompt = self.template.prompt(messages)
        except Rejected as error:
            raise ValueError(f"the chat template refuses this conversation: {error.detail}") from None
        ids: list[int] = []
        try:
            yield from self._write(prompt, self.template.stop_ids, ids)
        finally:
            said = self.template.decode([id for id in ids if id not in self.template.stop_ids])
            self.messages = [*messages, {"role": "assistant", "content": said}]

    def continue_text(self, text: str, *, framed: bool = True) -> Generator[str, None, None]:
        """Yield what follows a raw text, without template or memory of earlier ones.

        Args:
            text: its beginning.
            framed: put the token before it that begins a document, where the tokenizer has one.
        """
        begin = [self.template.bos_id] if framed and self.template.bos_id is not None else []
        prompt = begin + self.template.encode_text(text)
        if not prompt:
            raise ValueError("there is no text to go on from, and this tokenizer has no token that begins one")
        ends = (self.template.tokenizer.token_to_id(end) for _, end in DOCUMENT_FRAMES.values() if end)
        yield from self._write(prompt, (*self.template.stop_ids, *(end for end in ends if end is not None)), [])

    def _write(self, prompt: list[int], stop_ids: tuple[int, ...], ids: list[int]) -> Generator[str, None, None]:
        """Yield text, and append its tokens to `ids`."""
        characters = Characters(self.template.decode)
        self.cut, turn = False, self._answers
        self._answers += 1
        for token in self.text.stream(
            prompt, max_new_tokens=self.max_new_tokens, sampling=self.sampling, turn=turn, stop_ids=stop_ids
        ):
            ids.append(token)
            if token in stop_ids:
                return
            if piece := characters.add(token):
                yield piece
        self.cut = True


class Characters:
    """Tokens in, text out as soon as its characters are whole: a token may hold a third of one.

    Args:
        decode: ids to text, with U+FFFD for bytes that are no character.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self._ids: list[int] = []
        self._context, self._said = 0, 0  # tokens from which the last piece began, and up to which all is said

    def add(self, id: int) -> str:
        """What this token completes; empty while a character is open. An open one at the end is never shown."""
        self._ids.append(id)
        text = self.decode(self._ids[self._context :])
        if text.endswith(_INCOMPLETE):
            return ""
        # some decoders drop a space at the start of what they are given, so there is always something before it
        said = self.decode(self._ids[self._context : self._said])
        self._context, self._said = self._said, len(self._ids)
        return text[len(said) :]
