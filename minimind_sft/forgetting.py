"""The meter: how well a model knows the chats and the pretraining text, and how much worse than its base it became.

What is measured are sums over tokens, kept in float64 and divided once, so that the figure does not depend on how the
documents were dealt into batches or over ranks. Forgetting is the rise of the loss on pretraining text, in nats per
token, over the model that training started from:

    val/forgetting = val/pretrain/loss - (the same at step 0)

A chat model that is trained on may also forget how it used to answer: `val/own_chats/forgetting` is the same rise on
the answers of chats that it wrote itself before the first step (`self_written.py`).

Bits per byte divide by the bytes of the scored text instead of its tokens, which makes models with different
tokenizers comparable; a control token counts no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from minimind_sft.pretraining_text import SEEN, UNSEEN
from minimind_sft.readings import perplexity

CHAT, PRETRAIN, OWN_CHATS = "chat", "pretrain", "own_chats"


class TokenLoss(Metric):
    """Sums of nats, tokens and bytes, for each of P parts of what is measured; summed over ranks."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros(parts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: int, bytes: int, part: int = 0) -> None:
        """Add a sum of nats () over this many tokens of one part, which stand for this many bytes of text."""
        self.nats[part] += nats.double()
        self.tokens[part] += tokens
        self.bytes[part] += bytes

    def compute(self) -> dict[str, Tensor]:
        """Nats per token and bits per byte (), and nats per token by part (P,); NaN where nothing was scored."""
        nats = self.nats.sum()
        return {
            "loss": nats / self.tokens.sum(),
            "bits_per_byte": nats / math.log(2) / self.bytes.sum(),
            "by_part": self.nats / self.tokens,
        }


@dataclass(frozen=True)
class Reading:
    """One look at a model. Losses in nats per token; None where there was nothing to measure on."""

    step: int
    chat_loss: float | None = None
    pretrain_loss: float | None = None
    bits_per_byte: float | None = None
    by_source: dict[str, float] | None = None  # the text's loss for each of its sources, where they are named
    own_chat_loss: float | None = None  # on the answers of chats that the base wrote

    def metrics(self, base: Reading | None) -> dict[str, float]:
        """What is logged, under its public names; `val/forgetting` only against a base."""
        out: dict[str, float] = {}
        if self.chat_loss is not None:
            out["val/chat/loss"] = self.chat_loss
            out["val/chat/perplexity"] = perplexity(self.chat_loss)
        if self.pretrain_loss is not None:
            out["val/pretrain/loss"] = self.pretrain_loss
            if self.bits_per_byte is not None:
                out["val/pretrain/bits_per_byte"] = self.bits_per_byte
            if base is not None and base.pretrain_loss is not None:
                out["val/forgetting"] = self.pretrain_loss - base.pretrain_loss
        if self.own_chat_loss is not None:
            out["val/own_chats/loss"] = self.own_chat_loss
            if base is not None and base.own_chat_loss is not None:
                out["val/own_chats/forgetting"] = self.own_chat_loss - base.own_chat_loss
        return out

    def moved(self, start: Reading, whole: Reading) -> Reading:
        """A reading of everything, estimated from one of a part: what the whole read at the start, plus the change of
        the part since then.

        Args:
            start: the part at the start.
            whole: everything at the start.
        """
        changes = {}
        for name in ("chat_loss", "pretrain_loss", "bits_per_byte", "own_chat_loss"):
            now, then, all_then = (getattr(reading, name) for reading in (self, start, whole))
            known = now is not None and then is not None and all_then is not None
            changes[name] = all_then + (now - then) if known else None
        return Reading(self.step, **changes)

    @property
    def score(self) -> float | None:
        """What `best` means: the chat loss, or the text's where there are no chats."""
        return self.chat_loss if self.chat_loss is not None else self.pretrain_loss


class Meter(nn.Module):
    """Scores validation chats, pretraining text and chats that the base wrote.

    Args:
        names: what each evaluation loader holds, `CHAT`, `PRETRAIN` or `OWN_CHATS`, in the loaders' order.
        sources: of the pretraining text; one of no name where its lines name none.
    """

    def __init__(self, names: list[str], sources: Sequence[str] = ("",)) -> None:
        super().__init__()
        self.names, self.sources = names, list(sources)
        self.losses = nn.ModuleDict({name: TokenLoss(len(sources) if name == PRETRAIN else 1) for name in names})

    def update(self, loader: int, nats: Tensor, tokens: int, bytes: int, source: int = 0) -> None:
        """Add one batch of loader number `loader`, of one source where it is text; see `TokenLoss.update`."""
        name = self.names[loader]
        metric = self.losses[name]
        assert isinstance(metric, TokenLoss)
        metric.update(nats, tokens, bytes, source if name == PRETRAIN else 0)

    def reset(self) -> None:
        for metric in self.losses.values():
            assert isinstance(metric, TokenLoss)
            metric.reset()

    def read(self, step: int) -> Reading:
        """The sums of all ranks as a reading; the only place where the device is asked."""
        values: dict[str, dict[str, Any]] = {}
        for name, metric in self.losses.items():
            assert isinstance(metric, TokenLoss)
            values[name] = {key: value.tolist() for key, value in metric.compute().items()}
        chat, text, own = values.get(CHAT), values.get(PRETRAIN), values.get(OWN_CHATS)
        named = self.sources != [""]
        return Reading(
            step=step,
            chat_loss=chat["loss"] if chat else None,
            pretrain_loss=text["loss"] if text else None,
            bits_per_byte=text["bits_per_byte"] if text and math.isfinite(text["bits_per_byte"]) else None,
            by_source=_by_name(self.sources, text["by_part"]) if text and named else None,
            own_chat_loss=own["loss"] if own else None,
        )


def summary(
    before: Reading,
    after: Reading,
    best: Reading | None,
    *,
    text: str | None,
    from_base: bool = True,
    documents: Mapping[str, int] | None = None,
    looked_at: float = 1.0,
) -> dict[str, Any]:
    """What `forgetting.json` holds.

    Args:
        before, after, best: at step 0, at the end, and the best after step 0.
        text: what the text is to the base: `seen`, `unseen` or `self-written`.
        from_base: whether there is a base that could be forgotten.
        documents: how many there are of each source of the text.
        looked_at: the share of the documents that the best was looked at on.

    Returns:
        The three readings; `forgetting` of the last, and that of the base's own chats; `text`; `seen`; and
        `by_source`, a row per source (`source`, `documents`, `before`, `after`, `forgetting`), the most forgotten
        first, or null.
    """
    forgetting, of_chats = (
        new - old if from_base and old is not None and new is not None else None
        for old, new in (
            (before.pretrain_loss, after.pretrain_loss),
            (before.own_chat_loss, after.own_chat_loss),
        )
    )
    return {
        "before": _told(before),
        "after": _told(after),
        "best": _told(best) | {"looked_at": looked_at} if best else None,
        "forgetting": forgetting,
        "own_chats_forgetting": of_chats,
        "text": text,
        "seen": {SEEN: True, UNSEEN: False}.get(text or ""),
        "by_source": _by_source(before, after, documents or {}) if from_base else None,
    }


def _by_name(sources: Sequence[str], losses: float | list[float]) -> dict[str, float]:
    """Losses by source; torchmetrics makes a number of a list of one."""
    return dict(zip(sources, losses if isinstance(losses, list) else [losses], strict=True))


def _told(reading: Reading) -> dict[str, Any]:
    return {name: value for name, value in asdict(reading).items() if name != "by_source"}


def _by_source(before: Reading, after: Reading, documents: Mapping[str, int]) -> list[dict[str, Any]] | None:
    if before.by_source is None or after.by_source is None:
        return None
    rows = [
        {
            "source": source,
            "documents": documents.get(source),
            "before": before.by_source[source],
            "after": loss,
            "forgetting": loss - before.by_source[source],
        }
        for source, loss in after.by_source.items()
        if source in before.by_source
    ]
    return sorted(rows, key=lambda row: -row["forgetting"])
