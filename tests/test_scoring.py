"""Two models on the same targets."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimind_sft import scoring
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.scoring import Row, score

BYTES = np.arange(64)  # id 7 stands for 7 bytes


def model(seed: int, spread: float = 1.0) -> Transformer:
    made = Transformer(ModelConfig.minimind3(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    made.initialise(seed)
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(spread)
    return made


def row(ids: list[int], context: int = 1) -> Row:
    return np.array(ids, np.int64), np.arange(len(ids)) >= context


def logits(of: Transformer, ids: list[int]) -> torch.Tensor:
    """Of one document alone, (L, V)."""
    with torch.no_grad():
        flat = torch.tensor(ids)
        return of(flat, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))


def test_a_model_that_knows_nothing_loses_ln_of_the_vocabulary_per_token() -> None:
    ignorant = model(0, spread=0.0)
    scores = score(ignorant, ignorant, [row([1, 2, 3])], [row([1, 2, 3])], token_bytes=BYTES)
    assert scores.before.tolist() == scores.after.tolist() == [pytest.approx(2 * math.log(64))]
    assert (scores.tokens.tolist(), scores.bytes.tolist()) == ([2], [5])


def test_a_model_does_not_differ_from_itself() -> None:
    same, rows = model(0, spread=30.0), [row([5, 6, 7, 8]), row([9, 10])]
    scores = score(same, same, rows, rows, token_bytes=BYTES)
    assert scores.before.tolist() == scores.after.tolist()
    assert scores.kl.tolist() == [0.0, 0.0]
    assert scores.agreed.tolist() == scores.tokens.tolist() == [3, 1]


def test_sums_are_those_of_each_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = model(0, spread=30.0), model(1, spread=30.0)
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
    rows = [row(ids) for ids in documents]
    monkeypatch.setattr(scoring, "rows_at_once", lambda vocab_size, device: 3)  # chunks of 3 targets
    scores = score(base, tuned, rows, rows, token_bytes=BYTES)
    for place, ids in enumerate(documents):
        old, new = (logits(of, ids)[:-1].log_softmax(-1) for of in (base, tuned))
        wanted = torch.tensor(ids[1:])
        assert scores.before[place] == pytest.approx(F.nll_loss(old, wanted, reduction="sum").item(), rel=1e-5)
        assert scores.after[place] == pytest.approx(F.nll_loss(new, wanted, reduction="sum").item(), rel=1e-5)
        divergence = F.kl_div(new, old, log_target=True, reduction="sum").item()  # torch's order: KL(second || first)
        assert scores.kl[place] == pytest.approx(divergence, rel=1e-5) and divergence > 1e-3
        assert scores.agreed[place] == (old.argmax(-1) == new.argmax(-1)).sum()


def test_models_may_read_different_contexts_before_the_same_targets() -> None:
    base, tuned = model(0, spread=30.0), model(1, spread=30.0)
    raw, chat = [row([1, 2, 3, 4], context=2)], [row([9, 9, 9, 2, 3, 4], context=4)]
    scores = score(base, tuned, raw, chat, token_bytes=BYTES)
    alone = score(tuned, tuned, chat, chat, token_bytes=BYTES)
    assert scores.tokens.tolist() == [2]
    assert scores.after.tolist() == alone.after.tolist()
    assert scores.before[0] == score(base, base, raw, raw, token_bytes=BYTES).before[0]
