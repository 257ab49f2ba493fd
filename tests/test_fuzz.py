"""Lines broken in every way: each becomes a document or a named reason, and nothing else happens."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from minimind_sft import corpus
from minimind_sft.chat import ChatTemplate
from minimind_sft.corpus import Store
from minimind_sft.packing import SUPERVISED
from minimind_sft.sampling import read_lines

PROJECT = Path(__file__).resolve().parents[1]
LINES = int(os.environ.get("FUZZ_LINES", "100000"))

WHOLE: list[object] = [
    {"conversations": [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello!"}]},
    {"messages": [
        {"role": "system", "content": "", "tools": "[{\"name\": \"f\"}]"},
        {"role": "user", "content": [{"type": "text", "text": "一"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1]}}}]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "<think>\nno\n</think>\n\nTwo."},
    ]},
    {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": "Hi", "completion": "Hello!"},
    {"text": "The capital of Peru is Lima.", "source": "facts"},
]  # fmt: skip
PIECES = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"-1e999", b"NaN", b"\\ud800", b"\\u0000", b"\xff",
    b"\xef\xbb\xbf", b"\x00", b"\xe2\x80\xa8", b'"role": "tool"', b'"content": 7', b"<|im_start|>", b"</think>",
    b"{" * 200, b"[" * 5_000, b"9" * 5_000, "语言\U0001f600".encode(), b'"conversations": []', b'"messages": {}', b"  ",
]  # fmt: skip


def broken(chance: random.Random) -> str:
    """A line of valid UTF-8 with one to five things wrong, or none."""
    line = bytearray(json.dumps(chance.choice(WHOLE), ensure_ascii=chance.random() < 0.5).encode())
    for _ in range(chance.randrange(6)):
        at, length = chance.randrange(len(line) + 1), chance.randrange(12)
        what = chance.randrange(4)
        if what == 0:
            del line[at : at + length]
        elif what == 1:
            line[at:at] = chance.choice(PIECES)
        elif what == 2:
            line[at : at + 1] = bytes([chance.randrange(256)])
        else:
            line[at:at] = line[chance.randrange(len(line) + 1) :][:length]
    return bytes(line).decode(errors="replace").replace("\n", " ").replace("\r", " ")


@pytest.mark.slow
def test_every_broken_line_is_a_document_or_a_named_reason(tmp_path: Path) -> None:
    chance = random.Random(0)
    file = tmp_path / "broken.jsonl"
    lines = [broken(chance) for _ in range(LINES)]
    file.write_text("\n".join(lines), encoding="utf-8")
    blank = sum(not line.strip() for line in lines)
    (tmp_path / "store").mkdir()
    template = ChatTemplate.from_folder(PROJECT / "data" / "tokenizer")
    corpus.build(tmp_path / "store", read_lines([file]), template=template)
    store = Store(tmp_path / "store")
    print(f"{LINES:,} lines: {blank} blank, {len(store):,} documents, {store.rejected}")
    assert len(store) + sum(store.rejected.values()) + blank == LINES
    assert Counter(row["reason"] for row in store.rejections()) == store.rejected
    assert all(row["detail"] and 1 <= row["line"] <= LINES for row in store.rejections())
    assert len(store) > LINES // 10 and len(store.rejected) > 5
    # no line's text became a control token that its own template did not write: every turn is closed where it began
    start, end = (template.tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    for number in range(0, len(store), 97):
        ids, flags = store.document(number)
        assert abs(int((ids == start).sum()) - int((ids == end).sum())) <= 1
        assert ((flags & SUPERVISED) != 0).any()
