"""Two models on the same targets, document by document: losses, divergence, agreement.

In come rows of tokens for each model. Usually they are the same rows; they may differ in what stands before the
targets (a raw document for one, a chat for the other), as long as the targets are the same tokens in the same order.
Out come sums per document, in float64, which whoever reads them divides once.

KL is over the full vocabulary, KL(base || tuned) = sum of p_base (log p_base - log p_tuned), at every target. Logits of
both models are made in chunks, so memory does not grow with the batch.

Shapes: D documents, N tokens of a batch, M of them targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimind_sft.attention import attention_backend, needs_device_cu_seqlens
from minimind_sft.batching import MicroBatch, in_order, pack
from minimind_sft.chunks import rows_at_once
from minimind_sft.evaluation import EVALUATION_TOKENS
from minimind_sft.model import Transformer

Row = tuple[np.ndarray, np.ndarray]  # token ids (L,), whether each one is a target (L,)


class Scores(NamedTuple):
    """Sums per document, all (D,)."""

    tokens: np.ndarray  # targets
    bytes: np.ndarray  # of text behind them
    before: np.ndarray  # nats of the base
    after: np.ndarray  # nats of the tuned model
    kl: np.ndarray  # nats of KL(base || tuned)
    agreed: np.ndarray  # targets at which both find the same token likeliest

    def at(self, rows: np.ndarray) -> Scores:
        """The scores of some documents."""
        return Scores(*(column[rows] for column in self))


@torch.inference_mode()
def score(
    base: Transformer,
    tuned: Transformer,
    base_rows: Sequence[Row],
    tuned_rows: Sequence[Row],
    *,
    token_bytes: np.ndarray,
    progress: Callable[[int], None] = lambda documents: None,
) -> Scores:
    """Score every document with both models.

    Args:
        base: on any device.
        tuned: on the same device, with the same vocabulary.
        base_rows: what the base reads, D rows.
        tuned_rows: what the tuned model reads; row by row the same targets in the same order.
        token_bytes: (V,) bytes of text that each id stands for.
        progress: called with the number of documents done.
    """
    assert base.config.vocab_size == tuned.config.vocab_size
    scores = Scores(*(np.zeros(len(base_rows), kind) for kind in (np.int64, np.int64, *[np.float64] * 3, np.int64)))
    lengths = np.array([max(len(a), len(b)) for (a, _), (b, _) in zip(base_rows, tuned_rows, strict=True)], np.int64)
    done = 0
    for group in in_order(lengths, max_tokens=EVALUATION_TOKENS):
        old, wanted = _targets(base, [base_rows[document] for document in group])
        new, also_wanted = _targets(tuned, [tuned_rows[document] for document in group])
        assert torch.equal(wanted, also_wanted), "both models must have the same targets"
        sums = _sums(base, tuned, old, new, wanted)
        labels = wanted.cpu().numpy()
        # nothing predicts a row's first token, so it never is a target
        owner = np.repeat(group, [int(supervised[1:].sum()) for _, supervised in (base_rows[d] for d in group)])
        np.add.at(scores.tokens, owner, 1)
        np.add.at(scores.bytes, owner, token_bytes[labels])
        for column, values in zip(scores[2:], sums, strict=True):
            np.add.at(column, owner, values)
        progress(done := done + len(group))
    return scores


@torch.inference_mode()
def losses(
    model: Transformer, rows: Sequence[Row], *, progress: Callable[[int], None] = lambda documents: None
) -> tuple[np.ndarray, np.ndarray]:
    """Targets (D,) and nats (D,) of every document by one model."""
    tokens = np.array([int(supervised[1:].sum()) for _, supervised in rows], np.int64)
    nats, done = np.zeros(len(rows)), 0
    for group in in_order(np.array([len(ids) for ids, _ in rows], np.int64), max_tokens=EVALUATION_TOKENS):
        hidden, wanted = _targets(model, [rows[document] for document in group])
        chunks = zip(*(part.split(_rows_at_once(model)) for part in (hidden, wanted)), strict=True)
        each = [-model.logits(states).float().log_softmax(-1).gather(-1, at[:, None])[:, 0] for states, at in chunks]
        np.add.at(nats, np.repeat(group, tokens[group]), torch.cat(each).cpu().numpy())
        progress(done := done + len(group))
    return tokens, nats


def _rows_at_once(model: Transformer) -> int:
    return rows_at_once(model.config.vocab_size, model.model.embed_tokens.weight.device.type)


def _targets(model: Transformer, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Hidden states in front of the targets (M, C), and the targets (M,)."""
    packed = _on(model, pack(rows))
    flat = packed.batch
    hidden = model.hidden(flat.input_ids, flat.positions, flat.cu_seqlens, flat.max_length)
    return hidden[packed.targets], flat.labels[packed.targets]


def _on(model: Transformer, packed: MicroBatch) -> MicroBatch:
    device = model.model.embed_tokens.weight.device
    batch, targets = packed.batch, packed.targets.to(device)
    boundaries = batch.cu_seqlens
    if needs_device_cu_seqlens(attention_backend(device, model.compute_dtype(), model.config.head_dim)):
        boundaries = boundaries.to(device)
    moved = (batch.input_ids.to(device), batch.labels.to(device), batch.positions.to(device))
    return packed._replace(batch=type(batch)(*moved, boundaries, batch.max_length), targets=targets)


def _sums(base: Transformer, tuned: Transformer, before: Tensor, after: Tensor, wanted: Tensor) -> list[np.ndarray]:
    """Per target, (M,) each: nats of the base, nats of the tuned model, KL, agreement."""
    rows = _rows_at_once(base)
    columns: list[tuple[Tensor, ...]] = []
    for old, new, labels in zip(before.split(rows), after.split(rows), wanted.split(rows), strict=True):
        log_p = base.logits(old).float().log_softmax(-1)  # (rows, V)
        log_q = tuned.logits(new).float().log_softmax(-1)
        at = labels[:, None]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        agreed = log_p.argmax(-1) == log_q.argmax(-1)
        columns.append((-log_p.gather(-1, at)[:, 0], -log_q.gather(-1, at)[:, 0], kl, agreed))
    return [torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True)]
