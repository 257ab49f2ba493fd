"""A store seen through settings: what is cut of long documents, and system prompts in front. Literals in and out."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_batching import store_of

from minimind_sft import corpus
from minimind_sft.chat import ChatTemplate, Span
from minimind_sft.corpus import Store
from minimind_sft.documents import NO_PROMPT, Documents
from minimind_sft.formats import parse
from minimind_sft.sampling import Line
from minimind_sft.system_prompts import find_prompts, read_prompts
from minimind_sft.windows import Plan

PROJECT = Path(__file__).resolve().parents[1]


# question 1 1, answer 2 2, question 3 3, answer 4 4 4; and a text without turns
CHAT = [Span([1, 1], False), Span([2, 2], True, ends_turn=True), Span([3, 3], False),
        Span([4, 4, 4], True, ends_turn=True)]
TEXT = [Span([5], False), Span([6] * 9, True)]


@pytest.mark.parametrize(
    ("too_long", "chat", "targets", "text"),
    [
        ("truncate_right", [1, 1, 2, 2, 3, 3, 4], 3, [5, 6, 6, 6, 6, 6, 6]),
        ("truncate_turns", [1, 1, 2, 2], 2, [5, 6, 6, 6, 6, 6, 6]),
        ("truncate_left", [2, 2, 3, 3, 4, 4, 4], 4, [6, 6, 6, 6, 6, 6, 6]),
    ],
)
def test_what_is_too_long_is_cut_as_asked_and_the_loss_is_counted(
    tmp_path: Path, too_long: str, chat: list[int], targets: int, text: list[int]
) -> None:
    documents = Documents(store_of(tmp_path / "s", [CHAT, TEXT]), max_length=7, too_long=too_long)
    assert [documents.row(number, True)[0].tolist() for number in (0, 1)] == [chat, text]
    lengths, counted = documents.sizes(np.array([True, True]))
    assert lengths.tolist() == [len(chat), 7] and counted.tolist() == [targets, 6]
    assert documents.row(0, True)[1][1:].sum() == targets
    assert (documents.cut, documents.lost) == (2, 0)
    assert documents.targets_lost == pytest.approx(1 - (targets + 6) / (5 + 9))


def test_the_first_documents_are_read_whole_and_short_ones_together(tmp_path: Path) -> None:
    texts = [[Span([number], False), Span([9] * (length - 1), True)] for number, length in enumerate([200, 60, 300, 9])]
    documents = Documents(store_of(tmp_path / "s", texts), max_length=768)

    def read(tokens: int) -> list[list[int]]:
        return [[int(ids[0]) for ids, _ in rows] for rows in documents.first(tokens)]

    assert read(10**9) == [[0, 1], [2], [3]]  # 260 and 300 tokens fill a pass
    assert read(201) == [[0, 1]] and read(200) == [[0]] and read(0) == []


def test_a_first_turn_that_does_not_fit_leaves_nothing_to_learn(tmp_path: Path) -> None:
    documents = Documents(store_of(tmp_path / "s", [CHAT, CHAT[:2]]), max_length=3, too_long="truncate_turns")
    assert documents.rejected == {"nothing_to_learn": 2} and documents.lost == 2 and documents.targets_lost == 1


def test_what_is_too_long_is_dropped_or_refused_by_name(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [CHAT[:2], CHAT])
    documents = Documents(store, max_length=7, too_long="drop")
    assert documents.index.tolist() == [0] and documents.rejected == {"too_long": 1}
    assert (documents.cut, documents.lost) == (0, 1) and documents.targets_lost == pytest.approx(5 / 7)
    with pytest.raises(ValueError, match=r"chats\.jsonl:2 has 9 tokens, more than data\.max_length = 7"):
        Documents(store, max_length=7, too_long="error")
    assert len(Documents(store, max_length=9, too_long="error")) == 2


def test_no_default_cut_changes_what_is_short_enough(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [CHAT, TEXT])
    for too_long in ("truncate_right", "truncate_turns", "truncate_left", "drop", "error"):
        documents = Documents(store, max_length=10, too_long=too_long)
        assert documents.row(0, True)[0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 4] and documents.targets_lost == 0


# ---- system prompts

PROMPTS = ["Answer in verse.", "Be brief."]
BARE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
CHATS = [BARE, [{"role": "system", "content": "Own."}, *BARE], [*BARE, *BARE]]


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.from_folder(PROJECT / "data" / "tokenizer")


def prompted(folder: Path, template: ChatTemplate, **more: str) -> Documents:
    lines = [Line("c.jsonl", n, json.dumps({"messages": chat})) for n, chat in enumerate(CHATS, 1)]
    lines.append(Line("c.jsonl", 4, json.dumps({"messages": BARE, "tools": [{"name": "f"}]})))
    folder.mkdir()
    corpus.build(folder, lines, template=template)
    return Documents(Store(folder), max_length=500, prompts=find_prompts(template, PROMPTS), **more)  # type: ignore


def test_a_chat_with_a_system_prompt_is_what_the_template_renders(tmp_path: Path, template: ChatTemplate) -> None:
    documents = prompted(tmp_path / "s", template)
    for number, chat in ((0, CHATS[0]), (2, CHATS[2])):
        for prompt, text in enumerate(PROMPTS):
            wanted = template.render(parse(json.dumps({"messages": [{"role": "system", "content": text}, *chat]})))
            ids, supervised = documents.row(number, True, prompt)
            assert ids.tolist() == [id for span in wanted for id in span.ids]
            assert supervised.tolist() == [span.supervised for span in wanted for _ in span.ids]
            lengths, targets = documents.sizes(np.ones(4, bool), np.full(4, NO_PROMPT) * (np.arange(4) != number)
                                               + prompt * (np.arange(4) == number))
            assert (lengths[number], targets[number]) == (len(ids), supervised[1:].sum())


def test_a_share_of_the_chats_without_a_prompt_gets_one_drawn_every_epoch(
    tmp_path: Path, template: ChatTemplate
) -> None:
    documents = prompted(tmp_path / "s", template)
    assert documents.takes_prompt.tolist() == [True, False, True, False]  # its own prompt, its own tools
    drawn = [Plan(documents, batch_size=1, system_ratio=1.0).epoch(number).prompt for number in range(8)]
    assert {tuple(prompt[[1, 3]].tolist()) for prompt in drawn} == {(NO_PROMPT, NO_PROMPT)}
    assert {int(prompt[0]) for prompt in drawn} == {0, 1}
    assert (Plan(documents, batch_size=1, system_ratio=0.0).epoch(0).prompt == NO_PROMPT).all()
    half = [Plan(documents, batch_size=1, system_ratio=0.5).epoch(number).prompt[0] for number in range(40)]
    assert 8 < sum(prompt == NO_PROMPT for prompt in half) < 32
    with pytest.raises(ValueError, match=r"data\.system_ratio is 2"):
        Plan(documents, batch_size=1, system_ratio=2)


def test_the_tokens_of_a_plan_are_those_of_its_rows_with_their_prompts(tmp_path: Path, template: ChatTemplate) -> None:
    plan = Plan(prompted(tmp_path / "s", template), batch_size=4, system_ratio=1.0)
    micro_batch = plan.micro_batch(0, 0, 0)
    assert len(micro_batch.batch.input_ids) == plan.epoch(0).window_tokens[0]
    assert "Answer in verse." in (text := template.decode(micro_batch.batch.input_ids.tolist())) or "Be brief." in text


def test_prompts_come_from_a_list_or_a_file_with_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffOne.\r\n\n Two. \nOne.\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "prompts.txt")) == read_prompts(["One.", "Two.", ""]) == ["One.", "Two."]
    (tmp_path / "prompts.txt").write_text("A\u2028b\x0bc\x85d\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["A\u2028b\x0bc\x85d"]
