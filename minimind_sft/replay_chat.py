"""Replay text as the model reads it: as pretraining had it, or in a chat, where the assistant goes on with it.

A base that is held on raw text alone may keep its knowledge there and lose it wherever a chat begins. So a share of the
pieces is replayed inside the chat template: the user gives a piece's beginning, and the assistant its rest. The base
reads the piece as it is, and the model is held to what the base says of the same tokens:

    base    <bos> t1 ... tk tk+1 ... tn <eos>
    model   <header of the user> t1 ... tk <end, header of the assistant> tk+1 ... tn <eos>

A piece from within a document has no <bos>; its first token is the user's like those behind it, and nobody's target.

There is no instruction, which would have a language and would teach the wording that a measurement asks with. The
tokens of the template are nobody's target.

Shapes: L tokens of a piece, K of its row in the chat.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minimind_sft.chat import ChatTemplate


class ReplayRow(NamedTuple):
    """A piece to replay. The model's n-th target is the same token as the base's n-th."""

    ids: np.ndarray  # (K,) what the model reads
    supervised: np.ndarray  # (K,) bool: which of them are targets
    base_ids: np.ndarray  # (L,) what the base reads
    base_supervised: np.ndarray  # (L,) bool


class ChatFrame(NamedTuple):
    """The tokens of a chat template around a user's text and in front of the answer."""

    before: np.ndarray
    between: np.ndarray
    control_ids: frozenset[int]  # of the tokenizer: a document begins with one where pretraining put it there

    @classmethod
    def of(cls, template: ChatTemplate) -> ChatFrame:
        """That of this template.

        Raises:
            ValueError: it has no such place for a user's text.
        """
        try:
            before, between = (np.array(ids, np.int64) for ids in template.around_user())
        except ValueError as error:
            raise ValueError(f"data.replay_in_chat: {error}; set it to 0, to replay text as it is") from None
        return cls(before, between, frozenset(template.control_ids))

    @property
    def size(self) -> int:
        """Tokens of the template: what a piece grows by at most."""
        return len(self.before) + len(self.between)

    def extra(self, first: int) -> int:
        """Tokens that a piece with this first one grows by."""
        return self.size - (first in self.control_ids)

    def around(self, ids: np.ndarray, supervised: np.ndarray, share: float) -> ReplayRow:
        """A piece (L,), its first `share` said by the user, without the control token that it may begin with."""
        begin = int(ids[0] in self.control_ids)
        cut = begin + round(share * (len(ids) - begin))
        nobody = [np.zeros(len(part), bool) for part in (self.before, self.between)]
        asked = supervised.copy()
        asked[0] = False
        return ReplayRow(
            np.concatenate([self.before, ids[begin:cut], self.between, ids[cut:]]),
            np.concatenate([nobody[0], asked[begin:cut], nobody[1], asked[cut:]]),
            ids,
            supervised,
        )
