"""Order, windows and micro-batches: literals in, literals out."""

from pathlib import Path

import numpy as np
import pytest

from minimind_sft import corpus
from minimind_sft.batching import IGNORE, in_order, pack
from minimind_sft.chat import ChatTemplate, Span
from minimind_sft.corpus import Store
from minimind_sft.documents import Documents
from minimind_sft.packing import SUPERVISED
from minimind_sft.replay import ReplayStream
from minimind_sft.replay_chat import ReplayRow
from minimind_sft.sampling import Line
from minimind_sft.windows import Plan

PROJECT = Path(__file__).resolve().parents[1]


def store_of(folder: Path, documents: list[list[Span]]) -> Store:
    folder.mkdir()
    corpus.build_from_spans(folder, documents, 100, source="chats.jsonl")
    return Store(folder)


def chat(question: int, answer: int) -> list[Span]:
    """A question of `question` tokens 1, 1, ... and an answer of `answer` tokens 2, 2, ..."""
    return [Span([1] * question, False), Span([2] * answer, True)]


def test_labels_are_shifted_within_each_document_and_end_unsupervised() -> None:
    packed = pack([(np.array([5, 6, 7]), np.array([False, True, True])), (np.array([8, 9]), np.array([True, False]))])
    assert packed.batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert packed.batch.labels.tolist() == [6, 7, IGNORE, IGNORE, IGNORE]
    assert packed.batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert packed.batch.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.batch.max_length == 3
    assert packed.targets.tolist() == [0, 1]
    assert packed.window_targets == 2


def test_no_documents_make_one_token_without_a_target() -> None:
    packed = pack([], window_targets=7)
    assert packed.batch.labels.tolist() == [IGNORE]
    assert packed.window_targets == 7


def test_optional_spans_are_left_out_as_tokens(tmp_path: Path) -> None:
    spans = [Span([1, 1], False), Span([8, 8, 8], True, optional=True), Span([2, 2], True)]
    documents = Documents(store_of(tmp_path / "s", [spans, chat(1, 2)]), max_length=100)
    kept, left_out = documents.row(0, True), documents.row(0, False)
    assert kept[0].tolist() == [1, 1, 8, 8, 8, 2, 2] and kept[1].tolist() == [False] * 2 + [True] * 5
    assert left_out[0].tolist() == [1, 1, 2, 2] and left_out[1].tolist() == [False] * 2 + [True] * 2
    lengths, targets = documents.sizes(np.array([False, True]))
    assert lengths.tolist() == [4, 3] and targets.tolist() == [2, 2]
    lengths, targets = documents.sizes(np.array([True, True]))
    assert lengths.tolist() == [7, 3] and targets.tolist() == [5, 2]


def test_cutting_counts_what_is_lost_and_drops_what_has_nothing_to_learn(tmp_path: Path) -> None:
    documents = Documents(store_of(tmp_path / "s", [chat(2, 2), chat(4, 3), chat(3, 5)]), max_length=4)
    assert documents.index.tolist() == [0, 2]
    assert documents.nothing_to_learn.tolist() == [1]
    assert documents.cut == 1
    assert documents.targets_lost == pytest.approx(1 - 3 / 10)
    assert documents.row(1, True)[0].tolist() == [1, 1, 1, 2]


def test_a_first_token_is_never_a_target(tmp_path: Path) -> None:
    documents = Documents(store_of(tmp_path / "s", [[Span([2, 2, 2], True)]]), max_length=10)
    assert documents.sizes(np.array([True]))[1].tolist() == [2]


@pytest.fixture
def ragged(tmp_path: Path) -> Documents:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 30, (43, 2)).tolist()
    return Documents(store_of(tmp_path / "s", [chat(q, a) for q, a in sizes]), max_length=40)


def windows(plan: Plan, epoch: int) -> list[set[int]]:
    """The documents of each window, over all its micro-batches."""
    shares = [plan.epoch(epoch).deal(window) for window in range(plan.windows)]
    return [{document for share in window for document in share.chats} for window in shares]


@pytest.mark.parametrize(("batch_size", "accumulate", "ranks"), [(16, 1, 1), (4, 4, 1), (1, 16, 1), (2, 4, 2)])
def test_a_window_holds_the_same_documents_however_it_is_dealt(
    ragged: Documents, batch_size: int, accumulate: int, ranks: int
) -> None:
    reference = Plan(ragged, batch_size=16)
    plan = Plan(ragged, batch_size=batch_size, accumulate=accumulate, ranks=ranks)
    assert windows(plan, 1) == windows(reference, 1)
    assert plan.epoch(1).window_targets.tolist() == reference.epoch(1).window_targets.tolist()
    for position in range(plan.windows * accumulate):
        found = sum(len(plan.micro_batch(1, position, rank).targets) for rank in range(ranks))
        assert found <= plan.micro_batch(1, position, 0).window_targets


def test_the_targets_of_a_windows_micro_batches_add_up(ragged: Documents) -> None:
    plan = Plan(ragged, batch_size=2, accumulate=4, ranks=2, empty_think_ratio=0.5)
    for window in range(plan.windows):
        parts = [plan.micro_batch(0, window * 4 + share, rank) for share in range(4) for rank in range(2)]
        assert sum(len(part.targets) for part in parts) == parts[0].window_targets


def test_every_document_comes_once_an_epoch_in_an_order_of_its_own(ragged: Documents) -> None:
    plan = Plan(ragged, batch_size=8)
    for epoch in (0, 1):
        assert sorted(plan.epoch(epoch).order.tolist()) == list(range(43))
    assert plan.epoch(0).order.tolist() != plan.epoch(1).order.tolist()
    assert plan.epoch(1).order.tolist() == Plan(ragged, batch_size=8).epoch(1).order.tolist()
    assert plan.epoch(0).order.tolist() != Plan(ragged, batch_size=8, seed=43).epoch(0).order.tolist()
    assert Plan(ragged, batch_size=8, shuffle=False).epoch(1).order.tolist() == list(range(43))


def test_a_short_window_still_has_exactly_its_micro_batches(ragged: Documents) -> None:
    plan = Plan(ragged, batch_size=2, accumulate=8)  # 43 = 16 + 16 + 11
    assert [len(plan.epoch(0).deal(window)) for window in range(3)] == [8, 8, 8]
    assert Plan(ragged, batch_size=5, accumulate=8).windows == 2  # and 3 documents for 8 micro-batches
    short = Plan(ragged, batch_size=5, accumulate=8).epoch(0).deal(1)
    assert [len(share.chats) for share in short] == [1] * 3 + [0] * 5


def test_the_longest_goes_first_to_the_emptiest_micro_batch(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [chat(1, size - 1) for size in (2, 8, 4, 7, 5, 6)])
    epoch = Plan(Documents(store, max_length=40), batch_size=3, accumulate=2).epoch(0)
    assert [sorted(epoch.lengths[share.chats].tolist()) for share in epoch.deal(0)] == [[4, 5, 8], [2, 6, 7]]


def test_the_bound_on_tokens_says_which_settings_can_keep_it(ragged: Documents, tmp_path: Path) -> None:
    Plan(ragged, batch_size=4, max_tokens_per_batch=300).epoch(0)
    with pytest.raises(ValueError, match=r"max_tokens_per_batch is 60.*accumulate_grad_batches to \d+ and lower"):
        Plan(ragged, batch_size=4, max_tokens_per_batch=60).epoch(0)
    with pytest.raises(ValueError, match=r"lower data.max_length \(the longest document has \d+ tokens\)"):
        Plan(ragged, batch_size=1, max_tokens_per_batch=10).epoch(0)
    long = Documents(store_of(tmp_path / "text", [chat(1, 200)]), max_length=201)
    replay = ReplayStream(long, ratio=1.0, seed=0)
    with pytest.raises(ValueError, match=r"lower data.replay_length \(the longest piece to replay has 201 tokens\)"):
        Plan(ragged, batch_size=4, max_tokens_per_batch=180, replay=replay).epoch(0)


@pytest.mark.parametrize(("chats", "replay"), [([], []), ([1], []), ([], [1])])
def test_a_micro_batch_of_replay_alone_has_documents(chats: list[int], replay: list[int]) -> None:
    ids, supervised = np.array([5, 6]), np.ones(2, bool)
    batch = pack(
        [(ids, supervised) for _ in chats], replay=[ReplayRow(ids, supervised, ids, supervised) for _ in replay]
    )
    assert batch.has_documents == bool(chats or replay)


def test_the_empty_think_ratio_is_a_share_of_documents_drawn_every_epoch(ragged: Documents) -> None:
    assert not Plan(ragged, batch_size=4, empty_think_ratio=0.0).epoch(0).keep.any()
    assert Plan(ragged, batch_size=4, empty_think_ratio=1.0).epoch(0).keep.all()
    plan = Plan(ragged, batch_size=4, empty_think_ratio=0.5)
    assert plan.epoch(0).keep.tolist() != plan.epoch(1).keep.tolist()


def test_groups_for_evaluation_hold_every_document_once_within_the_bound() -> None:
    assert in_order(np.array([3, 9, 4, 1]), max_tokens=8) == [[1], [2, 0, 3]]


def test_no_document_to_learn_from_is_an_error(tmp_path: Path) -> None:
    documents = Documents(store_of(tmp_path / "s", [chat(5, 5)]), max_length=3)
    with pytest.raises(ValueError, match="nothing can be learned.*data.max_length 3: raise it"):
        Plan(documents, batch_size=1)


def test_a_store_accounts_for_every_line(tmp_path: Path) -> None:
    good = '{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    lines = [Line("c.jsonl", number, text) for number, text in enumerate([good, "not json", '{"text": "x"}', good], 1)]
    template = ChatTemplate.from_folder(PROJECT / "data" / "tokenizer")
    (tmp_path / "s").mkdir()
    corpus.build(tmp_path / "s", lines, template=template)
    store = Store(tmp_path / "s")
    assert len(store) + sum(store.rejected.values()) == 4
    assert [store.where(number) for number in range(3)] == ["c.jsonl:1", "c.jsonl:3", "c.jsonl:4"]
    assert [(row["line"], row["reason"]) for row in store.rejections()] == [(2, "not_json")]
    assert store.hashes[0] == store.hashes[2] != store.hashes[1]
    ids, flags = store.document(0)
    assert "b" in template.decode(ids[(flags & SUPERVISED) != 0].tolist())


def test_a_store_is_built_once_and_a_killed_build_leaves_none(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> None:
        calls.append(folder)
        corpus.build_from_spans(folder, [], 10, source="x")
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.open_or_build(tmp_path, {"a": 1}, make)
    assert list(tmp_path.iterdir()) == []
    corpus.open_or_build(tmp_path, {"a": 1}, make)
    corpus.open_or_build(tmp_path, {"a": 1}, make)
    assert len(calls) == 2
    corpus.open_or_build(tmp_path, {"a": 2}, make)
    assert len(calls) == 3
