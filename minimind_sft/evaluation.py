"""What a look at a model reads: evaluation batches, prompts to answer, and how often a look is affordable.

Evaluation keeps nothing for a backward pass, so its batches are larger than training's; documents of like length go
together, and only those of one source, so that sums by source cost nothing. Every document goes to exactly one rank,
and what is drawn for it (whether its empty think block stays) is the same at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from minimind_sft.batching import MicroBatch, in_order, pack
from minimind_sft.chat import ChatTemplate
from minimind_sft.documents import Documents
from minimind_sft.formats import Conversation, Rejected, parse
from minimind_sft.sampling import Line
from minimind_sft.token_texts import TokenTexts

EVALUATION_TOKENS = 8_192  # of one batch
MOST_SOURCES = 40
OTHER_SOURCES = "(other sources)"


class Sources(NamedTuple):
    """Where documents come from, as the `source` of their line says."""

    names: list[str]  # "" where a line says nothing
    of: np.ndarray  # (D,) index into names

    @property
    def counts(self) -> dict[str, int]:
        """Documents of each source."""
        return dict(zip(self.names, np.bincount(self.of, minlength=len(self.names)).tolist(), strict=True))


def sources_of(documents: Documents) -> Sources:
    """The sources of documents, by name; where there are over `MOST_SOURCES`, the smallest are taken together."""
    known = documents.store.meta["sources"] or [""]
    codes, of, counts = np.unique(
        np.asarray(documents.store.sources)[documents.index], return_inverse=True, return_counts=True
    )
    by_name = sorted(range(len(codes)), key=lambda place: known[codes[place]])
    names = [known[codes[place]] for place in by_name]
    of, counts = np.argsort(by_name)[of], counts[by_name]
    if len(names) > MOST_SOURCES:
        for place in np.argsort(-counts, kind="stable")[MOST_SOURCES - 1 :].tolist():
            names[place] = OTHER_SOURCES
        together = sorted(set(names))
        names, of = together, np.asarray([together.index(name) for name in names])[of]
    return Sources(names, of)


def keeps_empty_think(count: int, ratio: float, seed: int) -> np.ndarray:
    """Which of so many documents to evaluate keep their empty think blocks, (count,) bool: the same ones every time."""
    return np.random.default_rng([seed, 0, 2]).random(count) < ratio


class EvaluationBatches(Dataset[MicroBatch]):
    """A rank's share of the documents to evaluate, in batches of about `EVALUATION_TOKENS` of one source each; `chosen`
    are the numbers of those to evaluate, None for all."""

    def __init__(
        self,
        documents: Documents,
        *,
        token_bytes: np.ndarray,
        empty_think_ratio: float,
        seed: int,
        rank: int,
        ranks: int,
        chosen: np.ndarray | None = None,
    ) -> None:
        self.documents, self.token_bytes = documents, token_bytes
        self.keep = keeps_empty_think(len(documents), empty_think_ratio, seed)
        lengths, _ = documents.sizes(self.keep)
        names, of = sources_of(documents)
        numbers = np.arange(len(documents)) if chosen is None else chosen
        members = [numbers[of[numbers] == source] for source in range(len(names))]
        self.groups = [
            (source, mine[group])
            for source, mine in enumerate(members)
            for group in in_order(lengths[mine], max_tokens=EVALUATION_TOKENS)
        ][rank::ranks]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> MicroBatch:
        source, group = self.groups[index]
        packed = pack([self.documents.row(number, bool(self.keep[number])) for number in group.tolist()])
        wanted = packed.batch.labels[packed.targets].numpy()
        return packed._replace(target_bytes=int(self.token_bytes[wanted].sum()), source=source)


def drawn(count: int, share: float, seed: int, *, rest: bool = False) -> np.ndarray:
    """A share of `count` documents, at least one, ascending, the same ones every time; or the rest of them."""
    order = np.random.default_rng([seed, 0, 4]).permutation(count)
    first = max(1, math.ceil(share * count))
    return np.sort(order[first:] if rest else order[:first])


def bytes_of_tokens(template: ChatTemplate) -> np.ndarray:
    """Bytes of text that each id stands for, (V,) int64; a control token counts none."""
    texts = TokenTexts(template.tokenizer)
    return np.array([0 if control else len(text) for control, text in zip(texts.is_control, texts.bytes, strict=True)])


def prompts(
    lines: Iterator[Line], template: ChatTemplate, max_length: int, *, format: str = "auto"
) -> Iterator[dict[str, Any]]:
    """What the model is asked in a chat: everything before its last assistant turn.

    Yields:
        `where` (file:line), `messages`, `prompt_ids` and `reference`; chats that cannot be read, that the template
        refuses, in which nobody asks, or that do not fit in `max_length` are left out.
    """
    for line in lines:
        try:
            chat = parse(line.text, format=format)
            if not isinstance(chat, Conversation):
                continue
            last = max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
            ids = template.prompt(chat.messages[:last], chat.tools)
        except Rejected:
            continue
        if last and len(ids) < max_length:
            yield {
                "where": f"{line.file}:{line.number}",
                "messages": chat.messages[:last],
                "prompt_ids": ids,
                "reference": chat.messages[last]["content"],
            }


def evaluation_tokens(evaluation: Mapping[str, Documents]) -> int:
    """Tokens that one look at the model costs, over all ranks."""
    return sum(int(documents.sizes(np.ones(len(documents), bool))[0].sum()) for documents in evaluation.values())


def affordable_interval(evaluation: int, tokens_per_step: float, share: float = 0.05) -> int:
    """Steps between two looks that cost about `share` of the time; a token trained costs as much as three looked at."""
    return max(1, math.ceil(evaluation / (3 * tokens_per_step * share))) if tokens_per_step else 1
