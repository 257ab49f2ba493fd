"""Second halves of documents, raw and asked for as a chat."""

from pathlib import Path

import pytest

from minimind_sft.answer_format import Answer, repeats, shares
from minimind_sft.chat import DOCUMENT_FRAMES, ChatTemplate
from minimind_sft.continuations import continuations, halves

PROJECT = Path(__file__).resolve().parents[1]
PERU = "Peru lies in South America, by the sea. Its capital is Lima, which is old. People speak Spanish there."
CHINESE = "秘鲁在南美洲，首都是利马。利马是一座古老的城市。那里的人们说西班牙语，也说克丘亚语。"


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.from_folder(PROJECT / "data" / "tokenizer")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One two three. Four five six.", "One two three. "),
        ("aaaa\nbb cc dd ee", "aaaa\n"),
        ("一二三四。五六七八。", "一二三四。"),
        ("one two three four", "one two "),
        ("A. bbbbbbbbbbbbbbbbbbbbbb", "A. bbbbbbbbb"),  # that end is too far from the middle
        ("3.14159265358979", "3.141592"),  # a point within a number ends nothing
    ],
)
def test_a_text_is_cut_where_a_sentence_or_line_ends_near_its_middle(text: str, first: str) -> None:
    assert halves(text) == (first, text[len(first) :])


def test_both_models_are_asked_for_the_same_tokens(template: ChatTemplate) -> None:
    rows = continuations([PERU, CHINESE], template, document_format="minimind3", max_length=768)
    assert rows.places.tolist() == [0, 1]
    for (raw, of_raw), (chat, of_chat) in zip(rows.raw, rows.chat, strict=True):
        assert raw[of_raw].tolist() == chat[of_chat].tolist()
    raw, wanted = rows.raw[0]
    assert template.decode(raw.tolist()) == "<|im_start|>" + PERU  # no end: the raw row is not scored on it
    assert template.decode(raw[wanted].tolist()) == "Its capital is Lima, which is old. People speak Spanish there."
    chat = template.decode(rows.chat[0][0].tolist())
    asked = "Continue this text:\n\nPeru lies in South America, by the sea.<|im_end|>"
    assert asked in chat and chat.endswith("People speak Spanish there.")
    assert "请接着往下写：\n\n秘鲁在南美洲" in template.decode(rows.chat[1][0].tolist())


def test_short_documents_are_left_out_and_long_ones_cut(template: ChatTemplate) -> None:
    rows = continuations(["Lima.", PERU * 20], template, document_format="bare", max_length=100)
    assert rows.places.tolist() == [1]
    assert 60 < len(rows.chat[0][0]) <= 102
    assert template.decode(rows.raw[0][0].tolist()).startswith("Peru lies in South America")


def test_text_by_a_base_without_the_framing_token_begins_as_the_base_wrote_it(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DOCUMENT_FRAMES, "minimind3", ("<none>", "<|im_end|>"))
    row = continuations([PERU], template, document_format="minimind3", max_length=768).raw[0][0].tolist()
    assert row[0] == template.bos_id and template.decode(row[1:]) == PERU


def test_markers_in_the_text_are_the_frame_and_not_something_that_the_user_says(template: ChatTemplate) -> None:
    framed = continuations([f"<|im_start|>{PERU}<|im_end|>"], template, document_format="minimind2", max_length=768)
    plain = continuations([PERU], template, document_format="minimind3", max_length=768)
    assert framed.raw[0][0].tolist() == plain.raw[0][0].tolist()
    assert framed.chat[0][0].tolist() == plain.chat[0][0].tolist()


@pytest.mark.parametrize(
    ("ids", "goes_round"),
    [
        ([1, 2, 3, 4] * 4, True),
        ([1, 2, 3, 4] * 3 + [1, 2, 3], False),
        ([7] * 7, True),  # 4 overlapping runs of 4
        ([7] * 6, False),
        ([], False),
        (list(range(500)), False),
    ],
)
def test_an_answer_repeats_when_four_tokens_occur_four_times(ids: list[int], goes_round: bool) -> None:
    assert repeats(ids) is goes_round


def test_shares_of_answers() -> None:
    given = [Answer("Lima.", 3, True, False), Answer("a a a a", 9, False, True)]
    assert shares(given) == {"ended": 0.5, "repeats": 0.5, "tokens": 6.0}
