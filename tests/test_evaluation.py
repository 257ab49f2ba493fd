"""What the model is asked in a chat."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from minimind_sft.chat import ChatTemplate
from minimind_sft.evaluation import bytes_of_tokens, prompts
from minimind_sft.files import PROJECT
from minimind_sft.sampling import read_lines

TOKENIZER = PROJECT / "data" / "tokenizer"


def said(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def asked(folder: Path, template: ChatTemplate, *rows: dict[str, Any], format: str = "auto") -> list[Any]:
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(prompts(read_lines([folder / "val.jsonl"]), template, 100, format=format))


def test_chats_in_which_nobody_asks_are_left_out(tmp_path: Path) -> None:
    alone, answered = said(("assistant", "Hi.")), said(("assistant", "Hi."), ("user", "A?"), ("assistant", "B."))
    (found,) = asked(tmp_path, ChatTemplate.from_folder(TOKENIZER), alone, answered)
    assert found["where"].endswith(":2") and found["reference"] == "B."


def test_chats_that_the_template_refuses_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": strict}), encoding="utf-8")
    twice = said(("user", "A?"), ("user", "B?"), ("assistant", "C."))
    (found,) = asked(tmp_path, ChatTemplate.from_folder(folder), twice, said(("user", "A?"), ("assistant", "C.")))
    assert found["where"].endswith(":2")


def test_rows_are_read_in_the_format_that_is_given(tmp_path: Path) -> None:
    both = said(("user", "A?"), ("assistant", "B.")) | {"prompt": "P", "completion": "Q"}
    template = ChatTemplate.from_folder(TOKENIZER)
    for format, question in (("openai", "A?"), ("completion", "P")):
        (found,) = asked(tmp_path, template, both, format=format)
        assert found["messages"][-1]["content"] == question


def test_bytes_of_sentencepiece_s_tokens_are_those_of_the_text() -> None:
    tokens = ["<unk>", "<0xE4>", "<0xB8>", "\u2581the", "é", "</s>"]
    tokenizer = Tokenizer(BPE({token: id for id, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    assert bytes_of_tokens(SimpleNamespace(tokenizer=tokenizer)).tolist() == [0, 1, 1, 4, 2, 0]  # type: ignore[arg-type]
