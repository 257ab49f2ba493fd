"""What holds on to the base: replay text in every window, KL, L2-SP, freezing, and one's own terms."""

import csv
import gc
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_verb
from test_batching import chat, store_of
from torch import Tensor

from minimind_sft.__main__ import main
from minimind_sft.batching import MicroBatch, pack
from minimind_sft.chat import ChatTemplate
from minimind_sft.comparison import compare
from minimind_sft.documents import Documents
from minimind_sft.fisher import RotatedAdamW, Scores, bases_of
from minimind_sft.forgetting import Reading
from minimind_sft.frozen import frozen_copy
from minimind_sft.holding import Holding
from minimind_sft.losses import kl_divergence
from minimind_sft.measuring import Measure
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.module import SFTModule
from minimind_sft.priors import EKFAC, EWC, prior_tokens_for
from minimind_sft.replay import ReplayStream
from minimind_sft.replay_chat import ChatFrame, ReplayRow
from minimind_sft.stores import Stores
from minimind_sft.terms import L2SP, ReplayKL, ReplayNextToken, Term, checked
from minimind_sft.weight_control import adapted
from minimind_sft.windows import Plan

PROJECT = Path(__file__).resolve().parents[1]


# ---- which text is replayed when


@pytest.fixture
def pool(tmp_path: Path) -> Documents:
    return Documents(store_of(tmp_path / "pool", [chat(1, size) for size in range(2, 22)]), max_length=40)


@pytest.fixture
def chats(tmp_path: Path) -> Documents:
    sizes = np.random.default_rng(0).integers(1, 30, (43, 2)).tolist()
    return Documents(store_of(tmp_path / "chats", [chat(q, a) for q, a in sizes]), max_length=40)


def test_a_pass_of_the_stream_holds_every_document_once_in_an_order_of_its_own(pool: Documents) -> None:
    stream = ReplayStream(pool, ratio=1.0, seed=0)
    first, second = (stream.between(n * stream.tokens, (n + 1) * stream.tokens).tolist() for n in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    cut = stream.tokens // 3
    pieces = [stream.between(a, b) for a, b in ((0, cut), (cut, 2 * cut), (2 * cut, 2 * stream.tokens))]
    assert np.concatenate(pieces).tolist() == first + second
    assert ReplayStream(pool, ratio=1.0, seed=1).between(0, stream.tokens).tolist() != first


def test_an_epoch_replays_its_share_of_tokens_and_goes_on_where_the_last_one_ended(
    pool: Documents, chats: Documents
) -> None:
    plan = Plan(chats, batch_size=8, replay=ReplayStream(pool, ratio=0.25, seed=0))
    plain = Plan(chats, batch_size=8)
    replayed = [plan.epoch(epoch).window_tokens - plain.epoch(epoch).window_tokens for epoch in (0, 1)]
    tokens = int(plain.epoch(0).window_tokens.sum())
    assert all(abs(int(share.sum()) - 0.25 * tokens) < 22 for share in replayed)  # the longest document has 22 tokens
    documents = [np.concatenate(plan.epoch(epoch).replay).tolist() for epoch in (0, 1)]
    assert sorted((documents[0] + documents[1])[:20]) == list(range(20))  # none twice before all came once
    assert plan.epoch(1).order.tolist() == plain.epoch(1).order.tolist()  # the chats are not disturbed


@pytest.mark.parametrize("longest", [8, 9, 15, 24])
def test_pieces_are_all_of_the_documents_each_once_and_none_too_long(pool: Documents, longest: int) -> None:
    stream = ReplayStream(pool, ratio=1.0, seed=0, piece_length=longest)
    rows = [stream.row(number) for number in range(len(stream.lengths))]
    sizes = [len(row.ids) for row in rows]
    assert sizes == stream.lengths.tolist() and max(sizes) <= longest and min(sizes) >= 3
    assert [int(row.supervised[1:].sum()) for row in rows] == stream.targets.tolist()
    assert np.concatenate([row.ids for row in rows]).tolist() == np.concatenate(
        [pool.row(number, True)[0] for number in range(len(pool))]
    ).tolist()  # fmt: skip
    numbers = [stream.between(at, at + 1) for at in range(stream.tokens)]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(len(rows)))


@pytest.mark.parametrize("longest", [None, 8])
def test_of_chats_that_are_replayed_only_the_answers_are_targets(chats: Documents, longest: int | None) -> None:
    stream = ReplayStream(chats, ratio=1.0, seed=0, piece_length=longest)
    rows = [stream.row(number) for number in range(len(stream.lengths))]
    assert [int(row.supervised[1:].sum()) for row in rows] == stream.targets.tolist()
    assert 0 < stream.targets.sum() < (stream.lengths - 1).sum()


def test_pieces_bring_more_subjects_into_every_window_for_the_same_tokens(pool: Documents, chats: Documents) -> None:
    subjects, tokens = {}, {}
    for longest in (None, 8):
        stream = ReplayStream(pool, ratio=0.5, seed=0, piece_length=longest)
        epoch = Plan(chats, batch_size=8, replay=stream).epoch(0)
        subjects[longest] = sum(map(len, epoch.replay))
        tokens[longest] = sum(int(stream.lengths[window].sum()) for window in epoch.replay)
    assert subjects[8] > 1.5 * subjects[None]
    assert abs(tokens[8] - tokens[None]) < 30


@pytest.mark.parametrize(("batch_size", "accumulate", "ranks"), [(4, 4, 1), (1, 16, 1), (2, 4, 2)])
def test_replay_is_the_same_however_a_window_is_dealt(
    pool: Documents, chats: Documents, batch_size: int, accumulate: int, ranks: int
) -> None:
    stream = ReplayStream(pool, ratio=0.25, seed=0)
    whole = Plan(chats, batch_size=16, replay=stream)
    plan = Plan(chats, batch_size=batch_size, accumulate=accumulate, ranks=ranks, replay=stream)
    for window in range(plan.windows):
        places = range(window * accumulate, (window + 1) * accumulate)
        parts = [plan.micro_batch(0, place, rank) for place in places for rank in range(ranks)]
        expected = whole.micro_batch(0, window, 0).replay
        assert expected is not None and len(expected.targets) == expected.window_targets > 0
        assert sum(len(part.replay.targets) for part in parts) == expected.window_targets  # type: ignore[union-attr]
        assert all(part.replay.window_targets == expected.window_targets for part in parts)  # type: ignore[union-attr]


def test_replay_text_lies_behind_the_chats_with_targets_of_its_own() -> None:
    rows = [(np.array(ids), np.array(flags, bool)) for ids, flags in (([1, 2, 3], [0, 1, 0]), ([4, 5], [1, 1]))]
    batch = pack(rows[:1], replay=[ReplayRow(*rows[1], *rows[1])], window_replay_targets=9)
    assert batch.batch.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.batch.labels.tolist() == [2, -100, -100, 5, -100]
    assert batch.targets.tolist() == [0] and batch.window_targets == 1
    replay = batch.replay
    assert replay is not None and replay.targets.tolist() == [3] and replay.window_targets == 9
    assert replay.base.input_ids.tolist() == [4, 5] and replay.base_targets.tolist() == [0]


FRAME = ChatFrame(np.array([1, 30]), np.array([2, 1, 31]), frozenset({1, 2}))


def test_a_document_in_a_chat_has_the_base_s_targets_in_the_base_s_order() -> None:
    ids, supervised = np.array([1, 11, 12, 13, 14, 2]), np.array([0, 1, 1, 1, 1, 1], bool)
    row = FRAME.around(ids, supervised, 0.4)
    assert row.ids.tolist() == [1, 30, 11, 12, 2, 1, 31, 13, 14, 2]
    assert len(row.ids) == len(ids) + FRAME.extra(1)
    batch = pack([], replay=[row], window_replay_targets=5)
    replay, flat = batch.replay, batch.batch
    assert replay is not None
    told = flat.labels[replay.targets].tolist()
    assert told == replay.base.labels[replay.base_targets].tolist() == [11, 12, 13, 14, 2]
    read = [flat.input_ids[at].item() for at in replay.targets.tolist()]
    assert read == [30, 11, 31, 13, 14]  # the first of each part is told by the template's last token
    assert replay.base.input_ids.tolist() == ids.tolist()


def test_a_later_piece_in_a_chat_keeps_its_first_token_and_asks_nothing_of_it() -> None:
    ids, supervised = np.array([11, 12, 13, 14]), np.ones(4, bool)
    row = FRAME.around(ids, supervised, 0.5)
    assert row.ids.tolist() == [1, 30, 11, 12, 2, 1, 31, 13, 14] and row.base_ids.tolist() == ids.tolist()
    assert len(row.ids) == len(ids) + FRAME.extra(11)
    batch = pack([], replay=[row], window_replay_targets=3)
    assert batch.replay is not None
    told = batch.batch.labels[batch.replay.targets].tolist()
    assert told == batch.replay.base.labels[batch.replay.base_targets].tolist() == [12, 13, 14]


def test_the_chat_around_a_document_is_what_a_user_s_text_gets() -> None:
    template = ChatTemplate.from_folder(PROJECT / "data" / "tokenizer")
    frame = ChatFrame.of(template)
    text = template.encode_text("a lake")
    assert template.prompt([{"role": "user", "content": "a lake"}]) == [*frame.before, *text, *frame.between]


def templated(one_user: str) -> ChatTemplate:
    """The demo's tokenizer with another template, of which the user's part is given."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}" + one_user + "{% else %}{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}"
    )
    specification = (PROJECT / "data" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    return ChatTemplate(specification, source, variables={"eos_token": "<|im_end|>"})


@pytest.mark.parametrize(
    ("one_user", "before", "between"),
    [
        ("[INST] {{ m.content }} [/INST] ", "[INST]", " [/INST] "),
        ("USER: {{ m.content }} ASSISTANT: ", "USER:", " ASSISTANT: "),
        ("### Q\n{{ m.content }}\n### A\n", "### Q\n", "\n### A\n"),
    ],
)
def test_a_space_that_becomes_part_of_the_users_first_token_is_none_of_the_frame(
    one_user: str, before: str, between: str
) -> None:
    template = templated(one_user)
    frame = ChatFrame.of(template)
    assert template.decode(frame.before.tolist()) == before and template.decode(frame.between.tolist()) == between


def test_a_template_without_a_place_for_replay_says_what_to_set() -> None:
    said = "data.replay_in_chat: the chat template puts nothing before what a user says; set it to 0"
    with pytest.raises(ValueError, match=said):
        ChatFrame.of(templated("{{ m.content }}\n### A\n"))


@pytest.mark.parametrize("longest", [None, 8])
def test_a_share_of_the_replay_comes_in_a_chat_and_the_stream_knows_its_lengths(
    pool: Documents, longest: int | None
) -> None:
    frame = FRAME._replace(control_ids=frozenset({1}))  # which the documents begin with, and no later piece
    plain = ReplayStream(pool, ratio=1.0, seed=0, piece_length=longest)
    pieces = len(plain.lengths)
    for share in (0.0, 0.5, 1.0):
        stream = ReplayStream(pool, ratio=1.0, seed=0, piece_length=longest, frame=frame, in_chat=share)
        rows = [stream.row(number) for number in range(pieces)]
        assert [len(row.ids) for row in rows] == stream.lengths.tolist()
        assert [int(row.supervised[1:].sum()) for row in rows] == stream.targets.tolist() == plain.targets.tolist()
        assert [int(row.base_supervised[1:].sum()) for row in rows] == stream.targets.tolist()
        in_chat = [len(row.ids) > len(row.base_ids) for row in rows]
        assert abs(in_chat.count(True) - share * pieces) <= pieces / 4 * (share == 0.5)
        assert stream.between(0, 100).tolist() == plain.between(0, 100).tolist()


# ---- the terms


def holding_of(*, prior_tokens: float = 0.0, seed: int = 0, more: list[Term] | None = None) -> Holding:
    return Holding(
        replay_loss="kl",
        replay_weight=1.0,
        replay_target=None,
        l2_sp=0.0,
        fisher_tokens=1,
        prior_tokens=prior_tokens,
        seed=seed,
        more=more,
    )


@pytest.mark.parametrize("prior_tokens", [0.0, 100.0])
def test_processes_hold_on_by_what_the_first_one_read(prior_tokens: float) -> None:
    sent: list[Any] = []

    def first(found: Any) -> Any:
        sent.append(found)
        return found

    def started(seed: int, broadcast: Callable[[Any], Any] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The bases, and the gradient of the pull on a model that has moved."""
        holding, model = holding_of(prior_tokens=prior_tokens, seed=seed), small_model()
        holding.choose(model, None, steps=1, chat_tokens=1, replay=False)
        text = [with_replay(3)]
        holding.start(torch.device("cpu"), [], half=None, read=lambda count: text, broadcast=broadcast)
        bases = dict(holding.bases(lambda count: text, broadcast))
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1
            for term in holding.pulls:
                term.pull(model)
        return bases, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    one, alone = started(0, first), started(1, None)
    other = started(1, lambda found: sent.pop(0))
    assert not sent and bool(one[1]) == bool(prior_tokens)
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(alone, one)


class Both(Term):
    def loss(self, model: Transformer, hidden: Tensor, batch: MicroBatch) -> Tensor:
        return hidden.sum()

    def pull(self, model: Transformer) -> Tensor:
        return model.lm_head.weight.sum()


@dataclass
class Growth(Term):
    """A term that is compared by what it holds, and so has no hash."""

    weight: float = 1.0

    def pull(self, model: Transformer) -> Tensor:
        return model.lm_head.weight.square().sum()


def test_pulls_of_one_s_own_and_of_ours_are_told_in_their_order() -> None:
    holding, model = holding_of(prior_tokens=100.0, more=[Growth()]), small_model()
    holding.choose(model, None, steps=1, chat_tokens=1, replay=False)
    text = [with_replay(3)]
    holding.start(torch.device("cpu"), [], half=None, read=lambda count: text, broadcast=None)
    with torch.no_grad():
        ours, theirs = holding.pull(model, RotatedAdamW(model.parameters(), lr=0.1))
    assert ours == 0.0 and theirs == model.lm_head.weight.square().sum()


class Weightless(Term):
    def __init__(self) -> None:
        pass


class Loss(Term):
    name = "loss"


@pytest.mark.parametrize(
    ("given", "said"), [(0.0, "a float"), (torch.zeros(1), r"a tensor of shape \(1,\)"), (None, "a NoneType")]
)
def test_a_term_of_one_s_own_must_give_one_number(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.terms: loss of Both gave {said}; it must give a tensor of shape"):
        checked(Both(), "loss", given)
    assert checked(Both(), "loss", torch.tensor(2.0)) == 2.0


def test_terms_without_a_weight_or_with_the_name_of_the_chats_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.terms: Weightless has no weight; let its __init__ call super"):
        holding_of(more=[Weightless()])
    with pytest.raises(ValueError, match=r"model\.terms: Loss is named loss"):
        holding_of(more=[Loss()])


def test_terms_that_could_not_be_told_apart_in_the_log_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.terms: Both has both a loss and a pull"):
        holding_of(more=[Both()])
    holding = holding_of(prior_tokens=1.0, more=[EKFAC()])
    with pytest.raises(ValueError, match=r"model\.terms: ekfac would be logged twice"):
        holding.choose(small_model(), None, steps=1, chat_tokens=1, replay=True)


@pytest.mark.parametrize(("half", "kept"), [(None, True), (torch.bfloat16, False)])
def test_the_base_is_kept_only_where_a_term_looks_at_it(half: torch.dtype | None, kept: bool) -> None:
    holding = holding_of()
    holding.choose(small_model(), None, steps=1, chat_tokens=1, replay=True)
    base = weakref.ref(holding._base)
    holding.start(torch.device("cpu"), [], half=half, read=lambda count: [], broadcast=None)
    assert holding.bases(lambda count: [], None) and base() is not None
    holding.release()
    gc.collect()
    assert (base() is not None) == kept
    holding.choose(small_model(), None, steps=1, chat_tokens=1, replay=True)
    assert len(holding.losses) == 1 and holding._base is None  # once


def test_kl_is_the_sum_over_positions_of_base_against_model() -> None:
    base = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])  # 1/4, 3/4 and 1/2, 1/2
    model = torch.zeros(2, 2, requires_grad=True)
    nats = kl_divergence(model, base, torch.eye(2), torch.eye(2))
    assert nats.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    (gradient,) = torch.autograd.grad(nats, model)
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.25], [0.0, 0.0]]))


@pytest.mark.parametrize("rows", [2, 256])
def test_kl_has_the_value_and_the_gradients_of_autograds(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("minimind_sft.losses.rows_at_once", lambda vocab_size, device: rows)
    torch.manual_seed(0)
    hidden, base = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5)
    weight, base_weight = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    wanted = F.linear(base, base_weight).log_softmax(-1)
    expected = F.kl_div(F.linear(hidden, weight).log_softmax(-1), wanted, reduction="sum", log_target=True)
    nats = kl_divergence(hidden, base, weight, base_weight)
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * nats, (hidden, weight)), torch.autograd.grad(3 * expected, (hidden, weight))
    )


def small_model(seed: int = 0) -> Transformer:
    model = Transformer(ModelConfig.minimind3(vocab_size=32, hidden_size=32, num_hidden_layers=1))
    model.initialise(seed)
    return model


def with_replay(chat_length: int) -> MicroBatch:
    rows = [(np.arange(1, length + 1), np.ones(length, bool)) for length in (chat_length, 6, 4)]
    return pack(rows[:1], replay=[ReplayRow(*row, *row) for row in rows[1:]], window_replay_targets=10)


def states(model: Transformer, batch: MicroBatch) -> Tensor:
    flat = batch.batch
    return model.hidden(flat.input_ids, flat.positions, flat.cu_seqlens, flat.max_length)


def test_the_kl_of_the_base_is_zero_and_that_of_another_model_does_not_depend_on_the_chats() -> None:
    term, model = ReplayKL(), small_model()
    term.start(small_model(), [], half=None)
    assert term.loss(model, states(model, with_replay(3)), with_replay(3)).item() == pytest.approx(0.0, abs=1e-6)
    other = small_model(1)
    found = [term.loss(other, states(other, batch), batch).item() for batch in map(with_replay, (3, 20))]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] > 1e-4


def test_in_half_precision_the_base_computes_as_the_model_does_under_autocast() -> None:
    term, model, batch = ReplayKL(), small_model(), with_replay(3)
    term.start(small_model(), [], half=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert term.loss(model, states(model, batch), batch).item() == 0.0


def test_the_weight_rises_above_the_target_and_falls_below_it_by_six_percent_a_step_at_most() -> None:
    assert adapted(5.0, 0.02, 0.02) == pytest.approx(5.0)
    assert adapted(5.0, 0.03, 0.02) == pytest.approx(5.0 * math.exp(0.03))
    assert adapted(5.0, 1.0, 0.02) == pytest.approx(5.0 * math.exp(0.06))
    assert adapted(5.0, 0.0, 0.02) == pytest.approx(5.0 * math.exp(-0.06))
    assert adapted(0.1, 0.0, 0.02) == 0.1 and adapted(100.0, 1.0, 0.02) == 100.0


def test_the_weight_stays_without_a_target_and_in_a_window_without_replay() -> None:
    model, batch = small_model(), with_replay(3)
    fixed, following = ReplayKL(2.0), ReplayKL(2.0, target=0.02)
    for term in (fixed, following):
        term.start(small_model(), [], half=None)
        term.loss(model, states(model, batch), batch)
        term.observe(1.0)
    assert fixed.weight == 2.0 and following.weight > 2.0
    assert following.adapts and not fixed.adapts
    weight, nothing = following.weight, pack([(np.array([1, 2]), np.ones(2, bool))], replay=[])
    following.loss(model, states(model, nothing), nothing)
    following.observe(0.0)
    assert following.weight == weight


def test_next_token_replay_is_the_cross_entropy_of_the_replay_text_alone() -> None:
    model, batch = small_model(), with_replay(3)
    logits = model.logits(states(model, batch))[batch.replay.targets]  # type: ignore[union-attr]
    wanted = torch.tensor([2, 3, 4, 5, 6, 2, 3, 4])
    expected = -torch.log_softmax(logits, -1)[range(8), wanted].sum() / 10
    assert ReplayNextToken().loss(model, states(model, batch), batch).item() == pytest.approx(expected.item())


def test_l2_sp_decays_towards_the_base_and_spares_control_tokens() -> None:
    model, term = small_model(1), L2SP(0.5)
    base, old = small_model(0), small_model(1)
    term.start(base, [7], half=None)
    with torch.no_grad():
        term.after_step(model, 0.2)
    for name, weight in model.named_parameters():
        before, origin = old.get_parameter(name), base.get_parameter(name)
        expected = before - 0.2 * 0.5 * (before - origin)
        if name == "model.embed_tokens.weight":
            expected[7] = before[7]
        torch.testing.assert_close(weight, expected)


def test_the_base_s_output_layer_goes_where_the_model_went() -> None:
    model = small_model(0)
    head = model.lm_head.weight.detach().clone()  # no part of the model any more
    model.reset_head(seed=1)
    base = frozen_copy(model.to("meta"), head)
    assert {tensor.device.type for tensor in base.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("term", [L2SP(0.5), EWC(1.0, tokens=1), EKFAC(1.0, tokens=1)])
def test_a_new_output_layer_is_not_pulled_to_the_old_one(term: Term) -> None:
    model, text = small_model(0), [with_replay(3)]
    head = model.lm_head.weight.detach().clone()
    model.reset_head(seed=1)
    base = frozen_copy(model, head)
    term.start(base, [], half=None)
    term.read(base, text)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1
    moved = {name: weight.clone() for name, weight in model.named_parameters()}
    if isinstance(term, EWC):
        with torch.no_grad():
            term.pull(model)
        assert model.lm_head.weight.grad is None and model.model.norm.weight.grad.abs().max() > 0  # type: ignore[union-attr]
    else:
        with torch.no_grad():
            term.after_step(model, 0.2)
        assert torch.equal(model.lm_head.weight, moved["lm_head.weight"])
        assert not torch.equal(model.model.embed_tokens.weight, moved["model.embed_tokens.weight"])
    assert base.lm_head.weight.equal(head) and "lm_head.weight" in bases_of(Scores(base, text, 0))


# ---- through `fit`


class PullNorms(Term):
    """Somebody's own term."""

    name = "pull_norms"

    def loss(self, model: Transformer, hidden: Tensor, batch: MicroBatch) -> Tensor:
        return model.model.norm.weight.square().sum() * len(batch.targets) / batch.window_targets


def arguments(run_dir: Path, cache: Path) -> list[str]:
    """Of a few steps on the demo's data."""
    return [
        f"--run_dir={run_dir}", "--device=cpu", "--log_every_steps=1", "--val_every_steps=4", "--save_every_steps=2",
        f"--model.weights={PROJECT}/data/base.pth", f"--data.train_path={PROJECT}/data/sft_train.jsonl",
        f"--data.pretrain_path={PROJECT}/data/pretrain.jsonl", f"--data.heldout_path={PROJECT}/data/heldout.jsonl",
        f"--data.tokenizer={PROJECT}/data/tokenizer", f"--data.cache_dir={cache}", "--data.measure_documents=15",
        "--data.replay_documents=200", "--data.max_overlap=1.0", "--data.batch_size=16", "--trainer.max_steps=8",
        "--model.learning_rate=2e-3", "--export=none",
    ]  # fmt: skip


def fit(run_dir: Path, cache: Path, *more: str, ckpt: str | None = None) -> list[dict[str, str]]:
    """The metrics of a run."""
    assert main(["fit", *arguments(run_dir, cache), *more, *([f"--ckpt_path={ckpt}"] if ckpt else [])]) == 0
    return metrics(run_dir)


def metrics(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def state(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


REPLAY, BASIS, PULL = "--data.replay_ratio=0.5", "--model.fisher_tokens=1200", "--model.prior_tokens=4e7"


def test_the_first_screen_says_what_held_out_and_replayed_text_share(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (PROJECT / "data" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    longest = sorted((json.loads(line)["text"] for line in lines), key=len)[-3:]
    held_out = tmp_path / "heldout.jsonl"
    texts = [longest[0], "Said elsewhere: " + longest[1], "This stands nowhere else, and nothing in it does."]
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    fit(
        tmp_path / "run", cache, REPLAY, f"--data.heldout_path={held_out}", "--data.max_overlap=0.5",
        "--data.replay_documents=20000", "--trainer.max_steps=1",
    )  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "2 documents, unseen by the base; rejected: none; 1 more stands in data.pretrain_path, too: not" in said
    assert re.search(r"documents, none of them measured, without [1-9]\d* that repeat measured text\)", said)


@pytest.fixture(scope="module")
def held(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    run_dir = tmp_path_factory.mktemp("held") / "run"
    return run_dir, fit(run_dir, cache, REPLAY)


def test_replay_forgets_less_and_is_logged_and_the_base_is_not_saved(
    held: tuple[Path, list[dict[str, str]]], cache: Path, tmp_path: Path
) -> None:
    run_dir, rows = held
    plain = fit(tmp_path / "plain", cache)
    assert float(rows[-1]["val/forgetting"]) < 0.7 * float(plain[-1]["val/forgetting"])
    assert float(rows[1]["train/replay"]) == pytest.approx(0.0, abs=1e-5)  # at step 1 the model is the base
    assert float(rows[8]["train/replay"]) > 1e-3
    assert all(row["train/replay"] == "" for row in plain)
    assert rows[1]["train/loss"] == pytest.approx(plain[1]["train/loss"])
    names = state(run_dir)["state_dict"].keys()
    assert names == state(tmp_path / "plain")["state_dict"].keys()


def test_how_a_window_is_dealt_does_not_change_a_run_with_replay(
    held: tuple[Path, list[dict[str, str]]], cache: Path, tmp_path: Path
) -> None:
    rows = fit(tmp_path / "run", cache, REPLAY, "--data.batch_size=4", "--trainer.accumulate_grad_batches=4")
    for row, expected in zip(rows[1:], held[1][1:], strict=True):
        for name in ("train/loss", "train/replay", "grad_norm"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_two_processes_that_replay_and_are_pulled_in_a_basis_train_as_one(cache: Path, tmp_path: Path) -> None:
    options = [REPLAY, BASIS, PULL, "--trainer.max_steps=6", "--data.batch_size=8"]
    one = fit(tmp_path / "one", cache, *options, "--trainer.accumulate_grad_batches=2")
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    done = run_verb("fit", [*arguments(tmp_path / "two", cache), *options, *ddp], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    two = metrics(tmp_path / "two")
    for row, expected in zip(two[1:], one[1:], strict=True):
        for name in ("train/loss", "train/replay", "train/ekfac"):
            # threads differ in number, and rounding turns the basis where eigenvalues are alike
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-3, abs=1e-5)


def test_a_pull_in_the_basis_holds_and_is_logged_and_leaves_the_basis_as_it_is(cache: Path, tmp_path: Path) -> None:
    basis, pulled = (fit(tmp_path / str(len(more)), cache, *more) for more in ([BASIS], [BASIS, PULL]))
    assert float(pulled[-1]["val/forgetting"]) < 0.9 * float(basis[-1]["val/forgetting"])
    assert float(pulled[1]["train/ekfac"]) == 0.0 and float(pulled[-1]["train/ekfac"]) > 0.0
    assert pulled[1]["train/loss"] == basis[1]["train/loss"]  # at step 1 the model is the base
    one, other = (state(tmp_path / name)["optimizer_states"][0]["bases"] for name in "12")
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_pull_stands_for_as_much_text_however_many_chats_there_are(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for rows in (400, 100):
        options = [BASIS, "--model.prior_tokens=1e6", f"--data.max_rows={rows}", "--trainer.max_steps=1"]
        fit(tmp_path / str(rows), cache, *options)
        screen = capsys.readouterr().out
        said = re.search(r"by ([\d,]+) tokens .* the ([\d,]+) supervised ones .*weight ([\d.]+)", screen)
        assert said
        prior, chats, weight = (float(figure.replace(",", "")) for figure in said.groups())
        assert prior == 1e6 and weight == pytest.approx(prior / chats, rel=5e-3)
        weights.append(weight)
    assert weights[1] == pytest.approx(4 * weights[0], rel=0.2)


def test_the_pull_is_the_stronger_the_shorter_the_run(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [prior_tokens_for(steps, 10**6) for steps in (1, 80, 160, 320, 5000)] == [16e6, 16e6, 8e6, 4e6, 4e6]
    assert prior_tokens_for(1, 414) == prior_tokens_for(5000, 414) == 400 * 414  # few chats
    fit(tmp_path / "run", cache, BASIS, "--model.prior_tokens=auto", "--trainer.max_steps=1")
    assert "as if by 16,000,000 tokens" in capsys.readouterr().out
    fit(tmp_path / "run", cache, BASIS, "--model.prior_tokens=4e6", "--trainer.max_steps=2", ckpt="last")
    assert "model.prior_tokens 16000000.0 -> 4000000.0" in capsys.readouterr().out


def test_without_any_text_the_basis_is_of_text_by_the_base(cache: Path, tmp_path: Path) -> None:
    ends = [
        fit(tmp_path / name, cache, "--data.pretrain_path=null", "--data.own_chats=0", *more)[-1]["train/loss"]
        for name, more in (("plain", []), ("basis", [BASIS]))
    ]
    assert ends[0] != ends[1]


@pytest.mark.parametrize("more", [[], ["--model.replay_target=0.001"], [BASIS], [BASIS, PULL]])
def test_a_run_with_replay_resumes_bit_for_bit_and_on_no_other_replay(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    schedule = ["--trainer.max_epochs=1", "--trainer.max_steps=-1", "--data.max_mb=0.012", *more]
    whole = fit(tmp_path / "whole", cache, REPLAY, *schedule, "--keep_every_steps=2")
    (middle,) = (tmp_path / "whole" / "checkpoints").glob("*2.ckpt")
    rest = fit(tmp_path / "rest", cache, REPLAY, *schedule, ckpt=str(middle))
    assert len(rest) > 1
    for row, expected in zip(rest, whole[-len(rest) :], strict=True):
        skip = ("seconds", "tokens_per_second")
        assert {k: v for k, v in row.items() if k not in skip} == {k: v for k, v in expected.items() if k not in skip}
    one, other = (state(tmp_path / name)["state_dict"] for name in ("whole", "rest"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(AssertionError):
        fit(tmp_path / "refused", cache, REPLAY, "--data.replay_length=20", *schedule, ckpt=str(middle))
    assert "replay was" in capsys.readouterr().err


def test_a_run_that_resumes_pulls_in_the_bases_of_its_moments(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path / "run", cache, BASIS, PULL, "--trainer.max_steps=2")

    def refuse(_: Any) -> Any:
        raise AssertionError("read anew")

    monkeypatch.setattr("minimind_sft.priors.bases_of", refuse)
    fit(tmp_path / "run", cache, BASIS, PULL, "--trainer.max_steps=3", ckpt="last")
    with pytest.raises(AssertionError):
        fit(tmp_path / "fresh", cache, BASIS, PULL, "--trainer.max_steps=2")


def test_a_run_with_a_pull_and_no_replay_resumes_on_no_other_text(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    lines = (PROJECT / "data/pretrain.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[:400]), encoding="utf-8")
    fit(tmp_path / "run", cache, BASIS, PULL, "--trainer.max_steps=2")
    with pytest.raises(AssertionError):
        fit(tmp_path / "run", cache, BASIS, PULL, f"--data.pretrain_path={text}", "--trainer.max_steps=3", ckpt="last")
    said = capsys.readouterr().err
    assert "text to read was " in said and "`text to read` for the pretraining text" in said


def test_the_best_of_a_run_that_goes_on_under_another_bound_is_one_whose_weights_are_there(
    cache: Path, tmp_path: Path
) -> None:
    run, chats = tmp_path / "run", f"--data.val_path={PROJECT}/data/sft_val.jsonl"
    rows = fit(run, cache, chats, "--val_every_steps=4", "--trainer.max_steps=8")
    forgotten = {int(row["step"]): float(row["val/forgetting"]) for row in rows if row["val/forgetting"]}
    best = run / "checkpoints" / "best.ckpt"
    assert forgotten[4] < forgotten[8] and torch.load(best, weights_only=True)["global_step"] == 8
    fit(run, cache, chats, "--val_every_steps=4", "--trainer.max_steps=9", "--model.max_forgetting=0", ckpt="last")
    told = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))["best"]["step"]
    assert told in (8, 9) and torch.load(best, weights_only=True)["global_step"] == told


def test_where_nothing_is_left_to_train_no_text_is_read(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [BASIS, PULL, "--trainer.max_steps=2"]
    fit(tmp_path / "run", cache, *options)
    assert "tokens of the base's text, before the first step" in capsys.readouterr().out
    fit(tmp_path / "run", cache, *options, ckpt="last")
    said = capsys.readouterr().out
    assert "nothing to train" in said and "tokens of the base's text, before" not in said


def test_without_a_pull_no_more_is_read_than_the_basis_takes(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, most in (([], "8,192"), ([PULL], "9,000")):  # 64 tokens for each of 128 channels
        name = str(len(more))
        options = ["--model.fisher_tokens=9000", "--data.replay_documents=900", "--trainer.max_steps=1", *more]
        fit(tmp_path / name, cache, *options)
        said = capsys.readouterr().out
        assert f"up to {most} tokens of the base's text, before the first step" in said
        (read,) = re.findall(r"in a basis read from ([\d,]+) tokens", said)
        assert 8_192 <= int(read.replace(",", "")) < 8_800


def test_a_run_in_a_basis_does_not_resume_in_another(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "run", cache, BASIS, "--trainer.max_steps=2")
    with pytest.raises(AssertionError):
        fit(tmp_path / "run", cache, "--trainer.max_steps=4", ckpt="last")
    assert "has a basis from 1200 tokens, and model.fisher_tokens is 0; set it to 1200" in capsys.readouterr().err
    fit(tmp_path / "run", cache, BASIS, PULL, "--trainer.max_steps=3", ckpt="last")
    assert "model.prior_tokens 0.0 -> " in capsys.readouterr().out


def test_in_a_run_that_resumes_the_pull_and_the_moments_share_their_bases(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def watched(module: SFTModule, *step: Any) -> Any:
        (optimizer,) = module.trainer.optimizers
        assert isinstance(optimizer, RotatedAdamW) and module.holding.prior is not None
        pulled = {module.model.get_parameter(name): basis for name, basis in module.holding.prior.bases.items()}
        seen.append(bool(pulled) and all(optimizer.bases[weight] is basis for weight, basis in pulled.items()))
        return original(module, *step)

    original = SFTModule.training_step
    monkeypatch.setattr(SFTModule, "training_step", watched)
    for steps, ckpt in ((1, None), (2, "last")):
        fit(tmp_path / "run", cache, BASIS, PULL, f"--trainer.max_steps={steps}", ckpt=ckpt)
    assert seen and all(seen)


def test_a_run_resumes_only_on_what_it_was_measured_on(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, chats, text = tmp_path / "run", tmp_path / "chats.jsonl", tmp_path / "text.jsonl"
    for name, path in (("sft_val", chats), ("heldout", text)):
        lines = (PROJECT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:9]), encoding="utf-8")
    fit(run, cache, "--trainer.max_steps=2")
    for option, said in ((f"--data.val_path={chats}", "data.val_path"), (f"--data.heldout_path={text}", "heldout")):
        with pytest.raises(AssertionError):
            fit(run, cache, option, "--trainer.max_steps=3", ckpt="last")
        error = capsys.readouterr().err
        assert "cannot resume" in error and said in error and "not what the run was measured on so far" in error
    validate = [word for word in arguments(run, cache) if word.split("=")[0] not in ("--log_every_steps",
                "--val_every_steps", "--save_every_steps")]  # fmt: skip
    assert main(["validate", *validate, "--ckpt_path=last"]) == 0
    assert "val/forgetting" in capsys.readouterr().out
    assert main(["validate", *validate, f"--data.heldout_path={text}", "--ckpt_path=last"]) == 0
    told = capsys.readouterr().out
    assert "no forgetting is told" in told and "val/forgetting" not in told and "val/pretrain/loss" in told


def test_facts_that_were_not_asked_before_are_not_compared(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, lines = tmp_path / "run", (PROJECT / "data/probes.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name in ("some", "others"):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:3] if name == "some" else lines[3:6]), encoding="utf-8")
    some, others = (f"--data.probes_path={tmp_path}/{name}.jsonl" for name in ("some", "others"))
    fit(run, cache, some, "--trainer.max_steps=2")
    (run / "probes.json").unlink()
    fit(run, cache, others, "--trainer.max_steps=3", ckpt="last")
    assert "no comparison of facts" in capsys.readouterr().out and not (run / "probes.json").exists()


def test_replay_in_a_chat_holds_the_chat_mode(
    held: tuple[Path, list[dict[str, str]]], cache: Path, tmp_path: Path
) -> None:
    in_chat = tmp_path / "in_chat"
    fit(in_chat, cache, REPLAY, "--data.replay_in_chat=1")
    measured = [
        compare(
            str(PROJECT / "data/base.pth"), str(run), heldout_path=str(PROJECT / "data/heldout.jsonl"), documents=40,
            tokenizer=str(PROJECT / "data/tokenizer"), cache_dir=str(cache), device="cpu",
        )[0]["continuations"]["difference"]
        for run in (held[0], in_chat)
    ]  # fmt: skip
    assert measured[1] < measured[0] - 0.1


def test_chats_that_are_validated_on_are_not_replayed_and_a_step_without_replay_has_no_kl(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, set[int], set[int]]] = []

    def watched(module: SFTModule, *step: Any) -> Any:
        text, validation = module.data.spare_text, module.data.dealt.validation
        assert text is not None and validation is not None and module.data.plan.replay is not None
        replayed = module.data.plan.replay.documents
        hashes = [set(np.asarray(those.store.hashes)[those.index].tolist()) for those in (replayed, validation)]
        seen.append((len(text), *hashes))
        return original(module, *step)

    original = SFTModule.training_step
    monkeypatch.setattr(SFTModule, "training_step", watched)
    chats = (PROJECT / "data" / "sft_val.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(chats[:7]) + '{"text": "One more, which is no chat."}\n')
    more = [f"--data.pretrain_path={tmp_path}/text.jsonl", f"--data.val_path={PROJECT}/data/sft_val.jsonl"]
    for in_chat in (0.0, 0.5):
        rare = ["--data.replay_ratio=0.001", f"--data.replay_in_chat={in_chat}", "--trainer.max_steps=2"]
        run = tmp_path / f"run{in_chat}"
        fit(run, cache, *more, *rare)
        kept, replayed, validated = seen[-1]
        assert kept == len(replayed) == 1 and not replayed & validated
        rows = metrics(run)
        assert "" in [row["train/replay"] for row in rows[1:]]


def test_replay_needs_text_and_says_what_to_do(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        fit(tmp_path / "run", cache, REPLAY, "--data.pretrain_path=null", "--data.replay_source=file")
    assert "set it to the text that the base was pretrained on" in capsys.readouterr().err.lower()


@pytest.mark.slow
def test_every_other_way_to_hold_on_changes_the_run(cache: Path, tmp_path: Path) -> None:
    losses = {}
    for name, options in {
        "kl": [REPLAY],
        "ntp": [REPLAY, "--model.replay_loss=ntp"],
        "weight": [REPLAY, "--model.replay_weight=3"],
        "pieces": [REPLAY, "--data.replay_length=16"],
        "target": [REPLAY, "--model.replay_target=0.0001"],
        "basis": [REPLAY, BASIS],
        "l2_sp": ["--model.l2_sp=10"],
        "freeze": ['--model.freeze=["*.mlp.*", "*embed_tokens*"]'],
        "term": ["--model.terms=[{class_path: test_holding.PullNorms, init_args: {weight: 0.1}}]"],
        "plain": [],
    }.items():
        losses[name] = fit(tmp_path / name, cache, "--trainer.max_steps=3", *options)[-1]["train/loss"]
    assert len(set(losses.values())) == len(losses)
    base = torch.load(PROJECT / "data" / "base.pth", weights_only=True)
    frozen = state(tmp_path / "freeze")["state_dict"]
    for name, tensor in frozen.items():
        unchanged = torch.equal(tensor, base[name.removeprefix("model.")].float())
        assert unchanged == (".mlp." in name or "embed_tokens" in name or "lm_head" in name), name


def test_little_text_is_halved_between_measuring_and_the_basis(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (PROJECT / "data" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    text = [f"--data.pretrain_path={tmp_path / 'text.jsonl'}", "--data.heldout_path=null"]
    fit(tmp_path / "run", cache, BASIS, *text, "--data.measure_documents=1000", "--trainer.max_steps=1")
    assert "10 documents" in capsys.readouterr().out


def test_a_weight_that_follows_a_target_goes_on_in_a_resume_unless_another_is_given(
    cache: Path, tmp_path: Path
) -> None:
    following = [REPLAY, "--model.replay_target=0.0001"]
    fit(tmp_path / "run", cache, *following, "--trainer.max_steps=2")
    for name, more in (("same", []), ("other", ["--model.replay_weight=7"])):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        rows = fit(tmp_path / name, cache, *following, "--trainer.max_steps=3", *more, ckpt="last")
        weights = [float(row["replay_weight"]) for row in rows if row["replay_weight"]]
        assert weights[:2] == weights[:1] + [pytest.approx(weights[1])] and weights[1] != 1.0
        assert (weights[2] == 7.0) == (name == "other")


@pytest.mark.slow
def test_the_weight_follows_the_target_and_the_divergence_the_weight(cache: Path, tmp_path: Path) -> None:
    steps = [REPLAY, "--trainer.max_steps=60", "--data.max_mb=1", "--val_every_steps=60", "--model.learning_rate=1e-3"]
    weights, ends = {}, {}
    for target in (1.0, 0.02):
        rows = fit(tmp_path / f"{target}", cache, *steps, f"--model.replay_target={target}")[1:]
        assert rows[0]["replay_weight"] == "1.0"
        weights[target] = float(rows[-1]["replay_weight"])
        ends[target] = float(np.mean([float(row["train/replay"]) for row in rows[-15:]]))
    assert weights[1.0] < 0.2 and weights[0.02] > 4.0
    assert ends[1.0] > 1.5 * ends[0.02]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.replay_weight=-1"], "0 or above"),
        (["--data.measure_documents=0"], "from 1 on"),
        (["--model.replay_target=0"], "above 0"),
        (["--model.replay_target=0.02", "--model.replay_weight=0"], "turns replay off"),
        (["--model.replay_target=0.02", "--model.replay_loss=ntp"], "set it to null"),
        (["--data.replay_length=7"], "at least 8, or null for whole documents"),
        (["--model.fisher_tokens=-1"], "0 or above"),
        ([BASIS, "--model.prior_tokens=-1"], "0 or above (0 is off), or auto"),
        ([PULL], "set it to 50000"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    with pytest.raises(AssertionError):
        fit(tmp_path / "run", cache, REPLAY, *options)
    assert said in capsys.readouterr().err


def test_from_scratch_there_is_nothing_to_hold_on_to(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = ["--model.weights=scratch", "--model.hidden_size=32", "--model.num_hidden_layers=1"]
    with pytest.raises(AssertionError):
        fit(tmp_path / "run", cache, *scratch, "--model.l2_sp=1")
    assert "model.l2_sp hold on to a base, and model.weights is scratch" in capsys.readouterr().err
    # what sft.yaml has on is left out
    plain = fit(tmp_path / "plain", cache, *scratch, "--trainer.max_steps=1")
    rows = fit(tmp_path / "left", cache, REPLAY, BASIS, PULL, *scratch, "--trainer.max_steps=1")
    assert "nothing to hold on to" in capsys.readouterr().out
    assert rows[1]["train/loss"] == plain[1]["train/loss"] and not rows[1].get("train/ekfac")


def test_with_nothing_but_a_new_output_layer_to_train_a_pull_is_nothing(cache: Path, tmp_path: Path) -> None:
    rows = fit(
        tmp_path / "run", cache, BASIS, PULL, "--model.reset_head=true", "--model.freeze=model.*",
        "--trainer.max_steps=2",
    )  # fmt: skip
    assert float(rows[-1]["train/ekfac"]) == 0.0


def test_a_pattern_that_freezes_nothing_is_an_error(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        fit(tmp_path / "run", cache, "--model.freeze=*.mpl.*")
    assert "no parameter is called '*.mpl.*'" in capsys.readouterr().err


# ---- which reading is the best, and when to stop


def measured(*losses: tuple[float, float], bound: float | None) -> Measure:
    measure = Measure(log_every=1, val_every=1, save_every=1, max_forgetting=bound, patience=2)
    measure.readings = [Reading(step, chat, text) for step, (chat, text) in enumerate(losses)]
    return measure


@pytest.mark.parametrize(("bound", "best", "stops"), [(None, 2, False), (0.25, 1, True), (0.05, 1, True)])
def test_the_best_reading_is_within_the_bound_or_the_one_that_forgot_least(
    bound: float | None, best: int, stops: bool
) -> None:
    measure = measured((5.0, 2.0), (4.0, 2.2), (3.0, 2.5), (3.5, 2.6), bound=bound)
    assert measure.best is not None and measure.best.step == best and measure.at_plateau == stops
    assert measure.within(measure.best) == (bound != 0.05)


def test_a_run_out_of_patience_stops_saves_and_stays_stopped(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--val_every_steps=2", "--patience=1", "--model.max_forgetting=0"]
    rows = fit(tmp_path / "run", cache, *options)
    assert rows[-1]["step"] == "4" and state(tmp_path / "run")["global_step"] == 4
    said = capsys.readouterr().out
    assert "no better reading since step 2" in said and "no reading was within model.max_forgetting = 0" in said
    assert fit(tmp_path / "run", cache, *options, ckpt="last")[-1]["step"] == "4"


# ---- text to replay is never measured on


def write_texts(path: Path, numbers: range) -> Path:
    path.write_text("".join(f'{{"text": "This is document {number}."}}\n' for number in numbers), encoding="utf-8")
    return path


@pytest.mark.parametrize("held_out", [None, range(12, 18)])
def test_what_is_measured_on_is_not_replayed(tmp_path: Path, held_out: range | None) -> None:
    pretrain = write_texts(tmp_path / "pretrain.jsonl", range(15))
    stores = Stores(
        train_path=str(write_texts(tmp_path / "train.jsonl", range(90, 95))),
        tokenizer=str(PROJECT / "data" / "tokenizer"),
        pretrain_path=str(pretrain),
        heldout_path=None if held_out is None else str(write_texts(tmp_path / "held_out.jsonl", held_out)),
        measure_documents=5,
        replay_documents=100,
        cache_dir=str(tmp_path / "cache"),
    )
    opened = stores.open(train=True, replay=True)
    assert opened.replay is not None and opened.measured is not None
    replayed, measured = (set(store.hashes.tolist()) for store in (opened.replay, opened.measured))
    assert not replayed & measured
    assert (len(replayed), len(measured)) == ((10, 5) if held_out is None else (12, 2))


def test_a_base_without_its_text_replays_what_it_writes_itself(cache: Path, tmp_path: Path) -> None:
    options = ["--data.replay_source=self", "--data.max_mb=0.03", "--data.max_length=48"]
    plain = fit(tmp_path / "plain", cache, "--data.max_mb=0.03", "--data.max_length=48")
    rows = fit(tmp_path / "run", cache, REPLAY, *options, "--data.pretrain_path=null")
    assert float(rows[1]["train/replay"]) == pytest.approx(0.0, abs=1e-5) and float(rows[-1]["train/replay"]) > 1e-3
    assert float(rows[-1]["val/forgetting"]) < 0.9 * float(plain[-1]["val/forgetting"])
    again = fit(tmp_path / "again", tmp_path / "another_cache", REPLAY, *options, "--data.pretrain_path=null")
    assert [row["train/replay"] for row in again] == [row["train/replay"] for row in rows]  # written by the seed
