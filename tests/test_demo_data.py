"""The embedded demo: what its files promise, checked on the files as shipped."""

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from minimind_sft import overlap

DATA = Path(__file__).resolve().parents[1] / "data"
LANGS = ("en", "zh")


def module(name: str) -> ModuleType:
    """One of the scripts in `data/`, which are not a package."""
    sys.path.insert(0, str(DATA))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DATA))


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def texts_of_chats() -> list[str]:
    chats = rows("sft_train.jsonl") + rows("sft_val.jsonl")
    return ["\n".join(message["content"] for message in row["conversations"]) for row in chats]


def all_facts() -> list[dict]:
    tables, probes = module("tables"), module("probes")
    return [
        fact
        for source in tables.TABLES
        for lang in LANGS
        for subject in tables.subjects(source, lang)
        for fact in probes.facts(subject)
    ]


def occurs(word: str, text: str) -> bool:
    """As a word of its own where it is written in Latin letters or digits: 7 + 5 is not in 17 + 5."""
    if word not in text:
        return False
    return re.search(rf"(?<![0-9A-Za-z]){re.escape(word)}(?![0-9A-Za-z])", text) is not None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DATA / "tokenizer" / "tokenizer.json"))


def test_the_script_makes_the_files_as_shipped(tmp_path, monkeypatch):
    make, people = module("make"), module("people")
    shipped = {path.relative_to(DATA) for path in [*DATA.glob("*.jsonl"), *DATA.glob("tokenizer/*")]}
    monkeypatch.setattr(make, "DATA", tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes((DATA / "chat_template.jinja").read_bytes())
    for step in ("texts", "chats", "probes", "tokenizer"):
        make.STEPS[step]()
    assert {path for path in shipped if (tmp_path / path).read_bytes() != (DATA / path).read_bytes()} == set()
    monkeypatch.setattr(people, "FACTS", tmp_path)
    monkeypatch.setattr(people, "read", module("tables").read)
    people.write()
    assert (tmp_path / "people.tsv").read_bytes() == (DATA / "facts" / "people.tsv").read_bytes()


def test_everything_together_stays_under_10_mb_and_the_base_under_4():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 10e6
    if (DATA / "base.pth").is_file():
        assert (DATA / "base.pth").stat().st_size < 4e6


def test_no_chat_holds_the_subject_and_the_answer_of_a_fact_outside_sft():
    chats = texts_of_chats()
    together = "\n".join(chats)
    outside = [fact for fact in all_facts() if not fact["in_sft"] and fact["subject"] in together]
    leaks = [
        (fact["name"], chat)
        for fact in outside
        for chat in chats
        if occurs(fact["subject"], chat) and occurs(fact["answer"], chat)
    ]
    assert leaks == []


def test_no_chat_names_an_invented_person():
    together = "\n".join(texts_of_chats())
    assert [fact["subject"] for fact in all_facts() if fact["source"] == "people" and fact["subject"] in together] == []


def test_every_fact_inside_sft_is_in_a_training_chat():
    chats = ["\n".join(m["content"] for m in row["conversations"]) for row in rows("sft_train.jsonl")]
    missing = []
    for fact in all_facts():
        if fact["in_sft"]:
            parts = [fact["subject"]] if fact["source"] != "sums" else re.findall(r"\d+", fact["subject"])
            if fact["question"].startswith("“"):  # asked by its line, not by its poem
                parts = [fact["question"].split("”")[0]]
            if not any(all(part in chat for part in [*parts, fact["answer"]]) for chat in chats):
                missing.append(fact["name"])
    assert missing == []


def test_the_two_halves_are_halves_and_people_are_outside():
    for source, subjects in module("tables").TABLES.items():
        for lang in LANGS:
            inside = [subject.in_sft for subject in subjects(lang)]
            share = sum(inside) / len(inside)
            assert share == 0 if source == "people" else 0.45 < share < 0.55, (source, lang)


def test_a_held_out_document_is_not_in_the_training_text_and_hardly_in_the_chats():
    held_out = [row["text"] for row in rows("heldout.jsonl")]
    assert not set(held_out) & {row["text"] for row in rows("pretrain.jsonl")}
    assert max(overlap.shares(held_out, texts_of_chats())) < 0.05


def test_no_line_occurs_twice():
    for name in ("pretrain.jsonl", "heldout.jsonl"):
        assert max(Counter(row["text"] for row in rows(name)).values()) == 1
        assert max(Counter(row["parent"] for row in rows(name)).values()) == 1
    chats = rows("sft_train.jsonl") + rows("sft_val.jsonl")
    assert max(Counter(json.dumps(row) for row in chats).values()) == 1


def test_wherever_a_prompt_occurs_in_the_text_its_answer_follows():
    text = "\n".join(row["text"] for row in rows("pretrain.jsonl"))
    for probe in rows("probes.jsonl"):
        before, *after = text.split(probe["prompt"])
        if probe["source"] == "sums":  # 7 + 5 is also the end of 17 + 5
            ends = [before, *after]
            after = [rest for end, rest in zip(ends, after, strict=False) if not end[-1:].isdigit()]
        assert after, f"{probe['name']} is never told in the probe's words"
        assert all(rest.lstrip(" ").startswith(probe["answer"]) for rest in after), probe["name"]


def test_a_probe_has_three_other_answers_and_a_name_of_its_own():
    probes = rows("probes.jsonl")
    assert len(probes) == len({(probe["name"], probe["source"]) for probe in probes})
    for probe in probes:
        assert len({probe["answer"], *probe["distractors"]}) == 4, probe["name"]


def test_tables_hold_what_their_subjects_require():
    tables = module("tables")
    elements = tables.read("elements")
    assert [row["number"] for row in elements] == [str(i) for i in range(1, 119)]
    for column in ("symbol", "name_en", "name_zh"):
        assert len({row[column] for row in elements}) == 118
    assert [row["name_en"] for row in tables.read("planets")][2::5] == ["Earth", "Neptune"]
    for table, column in (("capitals", "country_en"), ("capitals", "country_zh"), ("dynasties", "name_zh")):
        values = [row[column] for row in tables.read(table)]
        assert len(values) == len(set(values))
    assert all(int(s.fields["a"]) + int(s.fields["b"]) == int(s.fields["sum"]) <= 20 for s in tables.sums("en"))
    assert len(tables.read("people")) == 200


def test_control_tokens_have_minimind_s_ids(tokenizer):
    expected = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<tool_call>": 21, "</tool_call>": 22}
    expected |= {"<tool_response>": 23, "</tool_response>": 24, "<think>": 25, "</think>": 26, "<|buffer9|>": 35}
    assert {token: tokenizer.token_to_id(token) for token in expected} == expected
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert special == set(range(21))


def test_a_prompt_is_tokenized_as_the_beginning_of_its_sentence(tokenizer):
    for probe in rows("probes.jsonl"):
        space = " " if probe["lang"] == "en" else ""
        prompt, whole = (tokenizer.encode(probe["prompt"] + rest).ids for rest in ("", space + probe["answer"]))
        assert whole[: len(prompt)] == prompt, probe["name"]


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Île 7 + 5 = 12, «秘鲁»\t鿫\n  \U0001f41f N'Djamena"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def render(messages: list[dict], **variables: object) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # the field's, not HTML's
    config = json.loads((DATA / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    return environment.from_string(config["chat_template"]).render(messages=messages, **variables)


def test_the_template_writes_a_plain_chat():
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    assert render(chat) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert render(chat[1:2], add_generation_prompt=True).endswith("U<|im_end|>\n<|im_start|>assistant\n")


def test_the_template_writes_reasoning_calls_and_results():
    call = {"function": {"name": "add", "arguments": {"a": 7, "b": 5}}}
    chat = [
        {"role": "user", "content": "7 + 5?"},
        {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
    ]
    assert render(chat, tools=[{"name": "add"}]) == (
        '<|im_start|>system\nYou may call these functions:\n<tools>\n{"name": "add"}\n</tools>\nTo call one, write\n'
        '<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n7 + 5?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nAdd.\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 7, "b": 5}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n"
    )
