"""From files and settings to what is trained on, validated on and measured on."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from minimind_sft import account, corpus
from minimind_sft.caps import Caps
from minimind_sft.dealing import Dealt, content_hash
from minimind_sft.documents import TOO_LONG, Documents
from minimind_sft.files import Files
from minimind_sft.sampling import Line, rebuild
from minimind_sft.stores import Stores
from minimind_sft.windows import Plan

PROJECT = Path(__file__).resolve().parents[1]


def chat(question: str, answer: str = "Yes.", **more: Any) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"conversations": turns, **more}, ensure_ascii=False) + "\n"


def text(words: str) -> str:
    return json.dumps({"text": words}) + "\n"


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"tokenizer": str(PROJECT / "data" / "tokenizer"), "cache_dir": str(tmp_path / "cache")}


def test_opening_the_stores_needs_neither_torch_nor_lightning(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "chats.jsonl", chat("a"))
    code = (
        "import sys; from minimind_sft.stores import Stores; "
        f"print(len(Stores(**{settings!r}).open(train=True).train), {{'torch', 'lightning'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout == "1 set()\n"


# ---- who gets which document


def stores(settings: dict[str, Any], **more: Any) -> Stores:
    return Stores(**{"max_mb": None, "max_bad_ratio": 1.0} | settings | more)


def dealt(settings: dict[str, Any], **more: Any) -> Dealt:
    made = stores(settings, **more)
    return made.documents(made.open(train=True))


def lines_of(documents: Documents | None) -> list[int]:
    assert documents is not None
    return np.asarray(documents.store.line_numbers)[documents.index].tolist()


def test_a_byte_order_mark_before_a_chat_is_no_part_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", "\ufeff" + chat("a"), chat("b"), "\ufeff" + chat("a"))  # files laid end to end
    found = dealt(settings, train_path=path)
    assert lines_of(found.train) == [1, 2] and found.rejected == {"duplicate": 1}


def test_where_everything_is_validated_on_the_error_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", chat("a"), chat("b"))
    found = dealt(settings, train_path=path, val_path=path)
    assert found.train is not None
    with pytest.raises(ValueError, match=r"no document is left .*give data\.val_path other chats, or .*val_fraction"):
        Plan(found.train, batch_size=2)


@pytest.mark.parametrize(("count", "measured", "replayed"), [(7, 4, 3), (20, 5, 12), (1, 1, 0)])
def test_little_text_is_halved_where_it_is_both_measured_on_and_replayed(
    settings: dict[str, Any], tmp_path: Path, count: int, measured: int, replayed: int
) -> None:
    words = write(tmp_path / "t.jsonl", *(text(f"text {number}") for number in range(count)))
    settings |= {"train_path": write(tmp_path / "c.jsonl", chat("a")), "pretrain_path": words}
    made = stores(settings, measure_documents=5, replay_documents=12)
    if not replayed:
        with pytest.raises(ValueError, match="no text to replay or to read: data.pretrain_path has no document"):
            made.open(train=True, replay=True, halve=True)
        return
    opened = made.open(train=True, replay=True, halve=True)
    assert opened.measured is not None and opened.replay is not None
    assert (len(opened.measured), len(opened.replay)) == (measured, replayed)
    both = [set(np.asarray(store.line_numbers).tolist()) for store in (opened.measured, opened.replay)]
    assert not both[0] & both[1]
    whole = made.open(train=True).measured  # all of it is free to be measured on
    assert whole is not None and len(whole) == min(5, count)


def test_a_repeated_chat_is_trained_once_and_names_the_first(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", chat("a"), chat("b"), chat("a", id=7), chat("a", "No."))
    found = dealt(settings, train_path=path)
    assert lines_of(found.train) == [1, 2, 4] and found.rejected == {"duplicate": 1}
    assert list(found.rejections()) == [
        {"file": path, "line": 3, "reason": "duplicate", "detail": f"the same as {path}:1"}
    ]


def test_of_a_chat_that_stands_there_twice_both_answers_are_learned_where_each_line_teaches_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def line(*train: bool) -> str:
        turns = [{"role": role, "content": "Yes."} for _ in train for role in ("user", "assistant")]
        for turn, flag in zip(turns[1::2], train, strict=True):
            turn["train"] = flag  # type: ignore[assignment]
        return json.dumps({"messages": turns}) + "\n"

    path = write(tmp_path / "c.jsonl", line(True, False), line(False, True), line(True, False), line(False, True))
    found = dealt(settings, train_path=path)
    assert lines_of(found.train) == [1, 2] and found.rejected == {"duplicate": 2}
    settings["val_path"] = write(tmp_path / "v.jsonl", line(True, True))
    assert dealt(settings, train_path=path).rejected == {"duplicate": 2, "in_validation": 2}


def test_what_the_template_has_no_place_for_is_counted_and_kept_with_the_store(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(settings["tokenizer"], tokenizer)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    plain += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": plain}), encoding="utf-8")
    (tokenizer / "chat_template.jinja").unlink(missing_ok=True)
    tools = [{"name": "add"}]
    path = write(tmp_path / "c.jsonl", chat("a", tools=tools), chat("b", tools=tools), chat("c"))
    for _ in range(2):  # made, and from the cache
        found = dealt(settings, train_path=path, tokenizer=str(tokenizer))
        assert found.train is not None and found.train.store.dropped == {"tools": 2}
        assert account.dropped(found.train.store).startswith("2 without their tools: the chat template has no place")
        assert account.sums(found)["dropped_by_template"] == {"tools": 2}
    found = dealt(settings, train_path=path)
    assert found.train is not None and account.dropped(found.train.store) == ""


def test_the_tokens_of_the_sample_are_counted_up_to_the_length_of_this_run(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "c.jsonl", chat("a", "word " * 50), chat("b"))
    whole, cut = (account.sums(dealt(settings, train_path=path, max_length=length))["tokens"] for length in (768, 8))
    assert cut == 16 < whole


def test_a_format_of_chats_says_nothing_of_text(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", chat("a"), text("one"))
    settings["pretrain_path"] = write(tmp_path / "p.jsonl", text("two"), text("three"))
    found = dealt(settings, format="minimind")
    assert lines_of(found.measured) == [1, 2] and lines_of(found.train) == [1] and sum(found.rejected.values()) == 1


def test_white_space_around_a_text_does_not_hide_that_it_was_seen(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", chat("a"))
    settings["pretrain_path"] = write(tmp_path / "p.jsonl", text(" seen\n"), text("other"))
    settings["heldout_path"] = write(tmp_path / "h.jsonl", text("new"), text("seen"))
    assert lines_of(dealt(settings).measured) == [1]
    replayed = stores(settings).open(train=True, replay=True).replay
    assert replayed is not None and np.asarray(replayed.line_numbers).tolist() == [2]


def test_text_without_a_usable_line_is_told_by_file_and_line(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", chat("a"))
    settings["pretrain_path"] = write(tmp_path / "p.jsonl", '{"content": "one"}\n')
    settings["heldout_path"] = write(tmp_path / "h.jsonl", text("new"))
    with pytest.raises(ValueError, match=r"data\.pretrain_path: 1 of 1 lines .*p\.jsonl:1: keys are content"):
        stores(settings, max_bad_ratio=0.01).open(train=True, replay=True)


def test_a_text_of_blank_lines_is_told_by_its_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", chat("a"))
    settings["pretrain_path"] = write(tmp_path / "p.jsonl", "\n\n")
    with pytest.raises(ValueError, match=r"data\.pretrain_path: no line in .*p\.jsonl; nothing to measure on"):
        stores(settings).open(train=True)


def test_a_store_is_not_kept_under_the_hash_of_other_bytes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.jsonl"
    settings["train_path"] = write(path, chat("a"))
    build = corpus.build

    def changed(*given: Any, **options: Any) -> None:
        build(*given, **options)
        write(path, chat("another"))

    monkeypatch.setattr(corpus, "build", changed)
    with pytest.raises(ValueError, match=r"c\.jsonl changed while it was read: begin again"):
        stores(settings).train_store()
    monkeypatch.setattr(corpus, "build", build)
    assert len(stores(settings).train_store()) == 1 and not list((tmp_path / "cache").glob("*.tmp"))


def test_facts_of_many_files_are_read_and_kept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.jsonl" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_text(f"{number}\n")
    loads: list[int] = []
    load = Files._load
    monkeypatch.setattr(Files, "_load", lambda files: loads.append(1) or load(files))
    first = Files(tmp_path / "cache").facts(paths)
    assert [fact.text_bytes for fact in first] == [2] * 5 and len({fact.sha256 for fact in first}) == 5
    assert len(loads) == 2  # and not for every file
    monkeypatch.setattr("minimind_sft.files._read_facts", None)
    assert Files(tmp_path / "cache").facts(paths) == first


def test_chats_that_are_validated_on_leave_training(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", chat("a"), chat("b"), chat("c"))
    settings["val_path"] = write(tmp_path / "v.jsonl", chat("b"), chat("d"))
    found = dealt(settings)
    assert lines_of(found.train) == [1, 3] and found.rejected == {"in_validation": 1}
    assert [row["detail"] for row in found.rejections()] == [f"the same as {tmp_path / 'v.jsonl'}:1"]


@pytest.mark.parametrize("held_out", [True, False])
def test_near_copies_of_measured_text_are_not_replayed(
    settings: dict[str, Any], tmp_path: Path, held_out: bool
) -> None:
    def words(start: int, count: int = 60) -> str:
        return " ".join(str(number * 7919 % 100003) for number in range(start, start + count))

    lines = [text(words(100)), text(words(200)), text(words(100, 59) + " changed"), text(words(300))]
    settings |= {"train_path": write(tmp_path / "c.jsonl", chat("a")), "measure_documents": 1}
    if held_out:
        settings["heldout_path"] = write(tmp_path / "h.jsonl", text("Copied from elsewhere: " + words(100)))
        settings["pretrain_path"] = write(tmp_path / "p.jsonl", *lines)
    else:  # the smallest hash is measured on
        settings["pretrain_path"] = write(tmp_path / "p.jsonl", *lines[1:], text(words(200, 58)), text(words(300, 58)))

    def replayed(**more: Any) -> Documents:
        made = stores(settings, **more)
        found = made.documents(made.open(train=True, replay=True)).replay
        assert found is not None
        return found

    everything, left = replayed(max_overlap=1.0), replayed()
    assert len(everything) == 4
    assert left.rejected == {"in_measured": 2 if held_out else 1}
    if held_out:
        assert sorted(lines_of(left)) == [2, 4]


def test_text_that_is_measured_on_is_neither_trained_nor_validated_on(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", text("one"), text("two"), text("three"))
    settings["val_path"] = write(tmp_path / "v.jsonl", text("two"), text("four"))
    settings["pretrain_path"] = write(tmp_path / "p.jsonl", text("two"), text("one"), text("two"), text("five"))
    found = dealt(settings)
    assert lines_of(found.train) == [3] and lines_of(found.validation) == [2]
    assert sorted(lines_of(found.measured)) == [1, 2, 4] and found.rejected == {"in_measured": 2}


def test_held_out_text_that_stands_in_the_pretraining_text_is_not_measured_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", chat("a"))
    settings["pretrain_path"] = write(tmp_path / "p.jsonl", text("seen"))
    settings["heldout_path"] = write(tmp_path / "h.jsonl", text("new"), text("seen"))
    assert lines_of(dealt(settings).measured) == [1]
    settings["heldout_path"] = write(tmp_path / "h.jsonl", text("seen"))
    with pytest.raises(ValueError, match="none is unseen"):
        dealt(settings)


def test_a_fraction_to_validate_on_stays_when_the_file_grows_or_is_reordered(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    questions = [f"Question {number}" for number in range(60)]

    def validated(name: str, asked: list[str]) -> set[str]:
        path = write(tmp_path / name, *map(chat, asked))
        found = dealt(settings, train_path=path, val_fraction=0.3)
        assert len(lines_of(found.train)) + found.split_off == len(asked) and found.rejected == {}
        assert not set(lines_of(found.train)) & set(lines_of(found.validation))
        return {asked[line - 1] for line in lines_of(found.validation)}

    first = validated("a.jsonl", questions)
    assert 8 <= len(first) <= 28
    assert validated("b.jsonl", questions[::-1]) == first
    assert validated("c.jsonl", [*questions, *(f"More {n}" for n in range(40))]) & set(questions) == first
    assert dealt(settings, train_path=str(tmp_path / "a.jsonl")).validation is None


def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", chat("a"))
    for wrong, says in (
        ({"val_fraction": 0.1, "val_path": "v.jsonl"}, "data.val_path and data.val_fraction"),
        ({"val_fraction": 1.5}, "data.val_fraction is 1.5"),
        ({"max_mb": -1.0}, "data.max_mb is -1.0"),
        ({"max_rows": 0}, "data.max_rows is 0"),
        ({"max_tokens": 3}, "the first document has more"),
        ({"too_long": "cut"}, "data.too_long 'cut' is not known"),
        ({"supervise": "first"}, "data.supervise 'first' is not known"),
        ({"document_format": "qwen"}, "data.document_format 'qwen' is not known; choose one of minimind3, .*qwen3"),
        ({"system_prompts": []}, "data.system_prompts holds no prompt"),
        ({"system_prompts": "nowhere.txt"}, "data.system_prompts: .*nowhere.txt"),
    ):
        with pytest.raises(ValueError, match=says):
            dealt(settings, **wrong)


STRINGS = st.text(st.sampled_from('a "\\\x00\n\x7f\u2028一'), max_size=3)


@settings_of_hypothesis(max_examples=200, deadline=None)
@given(words=STRINGS, source=st.none() | STRINGS, space=st.sampled_from(["", " "]), ascii=st.booleans())
def test_content_of_a_text_is_its_text_however_the_line_is_written(
    words: str, source: str | None, space: str, ascii: bool
) -> None:
    row = {"text": words} | ({} if source is None else {"source": source})
    line = Line("f", 1, json.dumps(row, ensure_ascii=ascii, separators=("," + space, ":" + space)))
    other = Line("f", 1, json.dumps({"parent": [1], "text": words}))
    assert (content_hash(line) == content_hash(other)) is bool(words and not words.isspace())


def test_content_of_a_line_that_is_no_text_is_the_line() -> None:
    def content(line: str) -> bytes:
        return content_hash(Line("f", 1, line))

    assert content('{"text": "a"}') == content('{"text":"a"}')
    for line in ('{"text": "a", "text": "a"}', '{"text": "a", "source": "b", "source": "c"}', '{"text": "a"',
                 '{"text": "a", "messages": []}', '{"text": " "}', '{"text": "a\tb"}'):  # fmt: skip
        assert content(line) != content(line + " ") and content(line) != content('{"text": "a"}')


# ---- caps


def test_the_tightest_cap_wins_and_is_named_and_a_smaller_sample_is_part_of_a_larger_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", *(chat(f"Question {n}", "word " * n) for n in range(40)))

    def sample(**caps: Any) -> tuple[str, set[int]]:
        store = dealt(settings, **caps).train.store  # type: ignore[union-attr]
        return store.meta["note"]["tightest"], set(store.line_numbers.tolist())

    everything = sample(max_rows=1000)
    assert everything == ("end", set(range(1, 41)))
    tokens, size, rows = sample(max_tokens=400), sample(max_mb=0.003), sample(max_rows=30)
    assert (tokens[0], size[0], rows[0]) == ("max_tokens", "max_mb", "max_rows")
    order = sorted((tokens[1], size[1], rows[1]), key=len)
    assert 0 < len(order[0]) < len(order[1]) < len(order[2]) == 30 and order[0] < order[1] < order[2]
    assert sample(max_tokens=400, max_mb=0.003, max_rows=30) == tokens
    assert sample(max_rows=2, max_mb=0.003, max_tokens=400)[0] == "max_rows"
    assert sample(max_ratio=0.5, pretrain_mb=0.006, max_mb=1, max_rows=30) == ("max_ratio", size[1])
    assert sample(max_tokens=200)[1] < tokens[1]
    documents = dealt(settings, max_tokens=400).train
    assert documents is not None and 300 < len(documents.store.ids) <= 400


def test_a_sample_capped_in_tokens_is_rebuilt_from_what_was_noted(settings: dict[str, Any], tmp_path: Path) -> None:
    path = settings["train_path"] = write(tmp_path / "c.jsonl", *(chat(f"Question {n}") for n in range(40)))
    store = dealt(settings, max_tokens=200).train.store  # type: ignore[union-attr]
    (tmp_path / "sample.json").write_text(json.dumps(store.meta["note"]))
    rebuild(tmp_path / "sample.json", tmp_path / "again.jsonl")
    wanted = [Path(path).read_text().splitlines()[line - 1] for line in store.line_numbers.tolist()]
    assert (tmp_path / "again.jsonl").read_text().splitlines() == wanted


# ---- every line


GOOD = st.sampled_from(["a", "b", "c", "long " * 60])
LINE = st.one_of(GOOD.map(chat), GOOD.map(text), st.sampled_from(["{\n", "[]\n", "{}\n", '{"text": ""}\n']))


@settings_of_hypothesis(max_examples=40, deadline=None)
@given(train=st.lists(LINE, min_size=1, max_size=12), val=st.lists(LINE, max_size=4),
       too_long=st.sampled_from(TOO_LONG[:4]), split=st.booleans(), rows=st.sampled_from([None, 3]))
def test_every_line_ends_in_exactly_one_bucket(
    train: list[str], val: list[str], too_long: str, split: bool, rows: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "c.jsonl", *train)
        val_path = None if split or not val else write(Path(folder) / "v.jsonl", *val)
        try:
            found = dealt(
                {"tokenizer": str(PROJECT / "data" / "tokenizer"), "cache_dir": f"{folder}/cache"},
                train_path=path, val_path=val_path, val_fraction=0.5 if split else None, max_rows=rows,
                max_length=40, too_long=too_long,
            )
        except ValueError as error:
            assert "val_fraction" in str(error) and split
            return
        selected = found.train.store.meta["note"]["selected"]  # type: ignore[union-attr]
        used, validated = lines_of(found.train), lines_of(found.validation) if split else []
        rejected = [row["line"] for row in found.rejections()]
        assert len({*used, *validated, *rejected}) == len(used) + len(validated) + len(rejected) == selected
        assert Counter(row["reason"] for row in found.rejections()) == found.rejected
        assert account.sums(found)["trained"] + found.split_off + sum(found.rejected.values()) == selected
        numbers = [int(word.replace(",", "")) for word in account.used(found).split() if word.isdigit()]
        assert numbers[0] == len(used) and f"{len(rejected)} rejected" in account.used(found)


# ---- what is learned


def learned(settings: dict[str, Any], line: str, tmp_path: Path, **more: Any) -> str:
    made = stores(settings, train_path=write(tmp_path / "c.jsonl", line), **more)
    documents = made.documents(made.open(train=True)).train
    assert documents is not None
    ids, supervised = documents.row(0, True)
    return made.template.decode(ids[supervised].tolist())


def test_what_is_supervised_is_chosen_by_turn_message_and_reasoning(settings: dict[str, Any], tmp_path: Path) -> None:
    def row(first: dict[str, Any]) -> str:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ONE"} | first,
                 {"role": "user", "content": "r"},
                 {"role": "assistant", "content": "TWO", "reasoning_content": "THOUGHT"}]
        return json.dumps({"messages": turns}) + "\n"

    everything = learned(settings, row({}), tmp_path)
    assert all(word in everything for word in ("ONE", "TWO", "THOUGHT", "</think>"))
    last = learned(settings, row({}), tmp_path, supervise="last")
    assert "ONE" not in last and "THOUGHT" in last and "TWO" in last
    untrained = learned(settings, row({"train": False}), tmp_path)
    assert "ONE" not in untrained and "TWO" in untrained
    answers = learned(settings, row({}), tmp_path, supervise_reasoning=False)
    assert "ONE" in answers and "TWO<|im_end|>" in answers and "THOUGHT" not in answers and "think>" not in answers


def test_leaving_reasoning_out_changes_the_mask_and_no_ids(settings: dict[str, Any], tmp_path: Path) -> None:
    thinking = {"role": "assistant", "content": "Seven.", "reasoning_content": "3 + 4"}
    line = json.dumps({"messages": [{"role": "user", "content": "3 + 4?"}, thinking]}) + "\n"
    path = write(tmp_path / "c.jsonl", line)
    both = [stores(settings, train_path=path, supervise_reasoning=value).train_store() for value in (True, False)]
    assert both[0].ids.tolist() == both[1].ids.tolist()
    assert both[0].folder != both[1].folder  # the cache keeps them apart


def test_too_small_a_ratio_is_told_as_one(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "c.jsonl", chat("a"))
    settings["pretrain_path"] = write(tmp_path / "p.jsonl", text("some text of pretraining"))
    with pytest.raises(ValueError, match=r"data\.max_ratio 0\.001 of 37 bytes of pretraining text is less than the "):
        stores(settings, max_ratio=0.001).train_store()


def test_a_ratio_of_nothing_is_refused() -> None:
    Caps(None, 0.5, None, None, 100).check()
    for ratio in (0.0, -1.0):
        with pytest.raises(ValueError, match="give a ratio above 0"):
            Caps(None, ratio, None, None, 100).check()
