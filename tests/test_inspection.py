"""Looking at the data: what is shown is what fit trains on, readable without colours and safe to print."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minimind_sft import corpus, inspection, oddities
from minimind_sft.__main__ import main
from minimind_sft.chat import ChatTemplate
from minimind_sft.findings import histogram
from minimind_sft.inspection_rows import CUT, LEFT_OUT, USED, View
from minimind_sft.inspection_screen import row_text, visible
from minimind_sft.oddities import TokenTexts, scan
from minimind_sft.settings import SettingsParser, data_signature
from minimind_sft.stores import Stores
from minimind_sft.words import byte_letters

PROJECT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and "
    "enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"conversations": turns}, ensure_ascii=False) + "\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A byte is its own id; the control tokens follow from 256 on. The template opens every answer by an empty think
    block."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made = Tokenizer(models.BPE({letter: byte for byte, letter in byte_letters().items()}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    lines = chat("Hi", "Hello there.") * 2 + chat("法国的首都？", "巴黎。")
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    return {
        "data.train_path": tmp_path / "train.jsonl",
        "data.tokenizer": PROJECT / "data" / "tokenizer",
        "data.cache_dir": tmp_path / "cache",
        "data.max_mb": "null",
    }


def words(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def shown(capsys: pytest.CaptureFixture[str], settings: dict[str, Any], *more: str) -> str:
    assert main(["inspect", *words(settings), *more]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def refused(capsys: pytest.CaptureFixture[str], settings: dict[str, Any], *more: str) -> str:
    assert main(["inspect", *words(settings), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minimind_sft: error: ") and said.count("\n") == 1, said
    return said


def view_of(
    tokenizer: Path, tmp_path: Path, lines: str, *, max_length: int, **more: Any
) -> tuple[View, ChatTemplate]:
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    stores = Stores(train_path=str(tmp_path / "rows.jsonl"), tokenizer=str(tokenizer), max_mb=None, max_bad_ratio=1.0,
                    max_length=max_length, cache_dir=str(tmp_path / "cache"))
    dealt = stores.documents(stores.open(train=True))
    return View(dealt, TokenTexts(stores.template.tokenizer), **more), stores.template


# ---- the same as fit


def test_looking_needs_neither_torch_nor_lightning(settings: dict[str, Any], tmp_path: Path) -> None:
    argv = ["inspect", "--config=sft.yaml", *words(settings), f"--html={tmp_path / 'page.html'}"]
    code = (
        f"import sys; from minimind_sft.__main__ import main; assert main({argv!r}) == 0; "
        "print({'torch', 'lightning', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout.endswith("\nset()\n")


def test_the_keys_their_types_and_defaults_are_those_of_the_data_module() -> None:
    from minimind_sft.data import SFTDataModule

    theirs = list(inspect.signature(SFTDataModule.__init__).parameters.values())[1:]
    ours = list(inspect.signature(data_signature()).parameters.values())
    assert [str(ours_) for ours_ in ours] == [str(theirs_) for theirs_ in theirs]
    assert len(ours) > 15


def test_fit_starts_from_the_store_that_inspect_made(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minimind_sft.data import SFTDataModule

    shown(capsys, settings)

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(corpus, "build", build)
    module = SFTDataModule(str(settings["data.train_path"]), str(settings["data.tokenizer"]), max_mb=None,
                           cache_dir=str(settings["data.cache_dir"]))
    assert len(module.stores.train_store()) == 3


def test_a_row_has_the_tokens_and_targets_that_the_plan_counts(tokenizer: Path, tmp_path: Path) -> None:
    lines = "".join(chat("q" * n, "a" * (40 - n)) for n in range(1, 40))
    view, template = view_of(tokenizer, tmp_path, lines, max_length=64, empty_think_ratio=0.5)
    assert view.plan is not None
    epoch, states = view.plan.epoch(0), set()
    for place, number in enumerate(view.documents.index.tolist()):
        row = view.row(number)
        ids, supervised = view.documents.row(place, bool(epoch.keep[place]))
        assert (row.used, row.supervised) == (epoch.lengths[place], epoch.targets[place])
        used = [piece for piece in row.pieces if piece.state == USED]
        assert "".join(token for piece in used for token in piece.tokens) == template.decode(ids.tolist())
        assert [piece.supervised for piece in used for _ in piece.tokens] == supervised.tolist()
        assert row.used + row.cut == view.lengths[number]
        states |= {piece.state for piece in row.pieces}
    assert states == {USED, CUT, LEFT_OUT}


def test_configs_overlay_each_other_and_the_command_line_as_in_fit(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {train_path: a, tokenizer: t, max_mb: 1e-3, seed: 1}\nmodel: {odd: 1}\n")
    (tmp_path / "b.yaml").write_text("data: {seed: 2, train_path: [b, c]}\ntrainer: {accumulate_grad_batches: 8}\n")
    read = SettingsParser("inspect", "").read
    found = read([f"--config={tmp_path / 'a.yaml'}", "-c", str(tmp_path / "b.yaml"), "--data.max_length", "9"])
    assert (found.data.train_path, found.data.max_mb) == (["b", "c"], 0.001)
    assert (found.data.seed, found.data.max_length) == (2, 9)
    assert found.trainer.accumulate_grad_batches == 8
    found = read(["--data.seed=5", f"--config={tmp_path / 'a.yaml'}"])
    assert (found.data.seed, found.data.max_length, found.trainer.accumulate_grad_batches) == (1, 768, 1)


def test_the_shipped_configs_are_read() -> None:
    for config in sorted((PROJECT / "configs").glob("*.yaml")):
        SettingsParser("inspect", "").read(["--config=sft.yaml", f"--config={config}"])


# ---- what is shown


def test_without_colours_the_mask_is_in_the_text(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    said = shown(capsys, settings, "--rows=1", "--data.max_length=18")
    assert "\033" not in said
    assert (
        "  ⟪<|im_start|>⟫user↵\n  Hi⟪<|im_end|>⟫↵\n  ⟪<|im_start|>⟫assistant↵\n"
        "  ⟦Hello there.⟪<|im_end|>⟫↵\n  ⟧\n"
    ) in shown(capsys, settings, "--rows=1")
    (head,) = (line for line in said.splitlines() if line.startswith("row "))
    assert re.fullmatch(r"row 1 of 3  .*/train\.jsonl:1  \d+ tokens used, \d+ supervised \(.*%\), \d+ cut", head)


def test_what_is_cut_and_what_is_left_out_is_marked(tokenizer: Path, tmp_path: Path) -> None:
    view, _ = view_of(tokenizer, tmp_path, chat("Hi", "Hello"), max_length=24, empty_think_ratio=0.0)
    assert row_text(view.row(0), color=False) == (
        "⟪<|im_start|>⟫user↵\nHi⟪<|im_end|>⟫↵\n⟪<|im_start|>⟫assistant↵\n"
        "⦅⟦⟪<think>⟫↵\n↵\n⟪</think>⟫↵\n↵\n⟧⦆⟦Hel⟧⦃⟦lo⟪<|im_end|>⟫↵\n⟧⦄"
    )


def test_colours_change_with_the_mask_and_come_only_where_wanted(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = shown(capsys, settings, "--color=always", "--rows=1")
    assert "\033[32mHello there.\033[0m\033[1;30;42m<|im_end|>\033[0m" in said and "Hi\033[1;36m<|im_end|>" in said
    assert "⟦" not in said
    assert "\033" not in shown(capsys, settings, "--color=never")

    class Terminal:
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert inspection.wants_color("auto", Terminal()) and not inspection.wants_color("never", Terminal())  # type: ignore
    monkeypatch.setenv("NO_COLOR", "1")
    assert not inspection.wants_color("auto", Terminal())  # type: ignore[arg-type]


HOSTILE = "\033[31m\x9b2J\u202e ⟦not⟧ ⟪a mark⟫ <|im_end|> <script>alert('&')</script> \r end"


def test_no_content_can_move_the_cursor_or_pass_for_a_mark(tokenizer: Path, tmp_path: Path) -> None:
    view, _ = view_of(tokenizer, tmp_path, chat(HOSTILE, "ok"), max_length=500, empty_think_ratio=1.0)
    text = row_text(view.row(0), color=False)
    assert text.count("⟦") == text.count("⟧") == 1
    assert text.count("⟪<|im_end|>⟫") == 2 and " <|im_end|> " in text  # two turns end; the one typed ends nothing
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "\\u001b[31m\\u009b2J\\u202e \\u27e6not\\u27e7 \\u27eaa mark\\u27eb" in text
    assert visible("a\tb\nc") == "a⇥b↵\nc"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script" and not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)
        if tag not in ("meta",):
            self.open.append(f"{tag}.{dict(attrs).get('class', '')}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split(".")[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_the_page_stands_alone_and_escapes_everything(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "<b>&.jsonl"
    train.write_text(chat(HOSTILE, "Fine <b>") + "{<i>\n", encoding="utf-8")
    changed = settings | {"data.train_path": train}
    for more in ([], ["--where=not_json"]):
        said = shown(capsys, changed, f"--html={tmp_path / 'page.html'}", *more)
        assert f"page in {tmp_path / 'page.html'}" in said
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        page = Page()
        page.feed(text)
        assert page.open == [] and "default-src 'none'" in text and "prefers-color-scheme: dark" in text
        assert "<script>" not in text and "<b>&" not in text and "\033" not in text
        assert "the line begins &#x27;{&lt;i&gt;&#x27;" in text
    shown(capsys, changed, f"--html={tmp_path / 'page.html'}")
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "".join(page.texts["i.s"]).endswith("Fine <b>↵\n")
    assert page.texts["i.s c"] == ["supervised control token", "<|im_end|>"]
    assert "nowhere" in refused(capsys, settings, f"--html={tmp_path / 'nowhere' / 'page.html'}")


def test_the_figures_are_those_of_the_whole_set(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "more.jsonl"
    train.write_text(chat("Hi", "Hello") * 9 + "\n{x\n[]\n" + chat("long " * 800, "lost"), encoding="utf-8")
    said = shown(capsys, settings | {"data.train_path": train, "data.batch_size": 2,
                                     "trainer.accumulate_grad_batches": 2, "data.max_bad_ratio": 0.5}, "--rows=0")
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert "12 of 12 lines" in lines["lines"] and "1 blank" in lines["lines"]
    assert lines["kept"].split(maxsplit=1)[1] == (
        "1 trained, 11 rejected: 1 not_json, 1 not_an_object, 1 nothing_to_learn, 8 duplicate"
    )
    assert lines["rejected"].split() == ["rejected", "11"]
    assert f"1 not_json, the first: {train}:11: " in said and f"1 not_an_object, the first: {train}:12: " in said
    assert "truncate_right at 768 tokens: 0 of 2 cut, 1 lost (50.0%)" in lines["too long"]
    assert " 1 per epoch" in lines["steps"] and " 2 x 2 rows" in lines["steps"]
    assert "refuse" not in said and "row 1 of" not in said


def test_a_length_histogram_counts_every_row_once() -> None:
    lengths = np.array([9, 10, 20, 31, 32, 5000])
    bins = histogram(lengths, max_length=30)
    assert sum(b.rows for b in bins) == 6 and sum(b.cut for b in bins) == 3
    narrow = histogram(np.array([9, 10, 20, 31, 32]), max_length=30)
    assert [tuple(b) for b in narrow] == [(8, 15, 2, 0), (16, 23, 1, 0), (24, 31, 1, 1), (32, 39, 1, 1)]
    assert histogram(np.array([], np.int64), max_length=9) == []


def test_the_strangest_rows_are_found_however_the_store_is_cut_into_pieces(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [chat("Hi", "short"), chat("a b c", "x" * 50 + "yz"), chat("é" * 9, "<|im_end|> and <think>, <think>"),
             chat("plain", "words"), chat("say", ""), chat("more", " \n ")]
    view, _ = view_of(tokenizer, tmp_path, "".join(lines), max_length=500)
    for size in (1 << 20, 100, 1):
        monkeypatch.setattr(oddities, "_PIECE", size)
        found = scan(view.store, view.texts)
        assert found.documents == 6
        assert found.repeated == (50, 1, "x") and found.word == (52, 1, "x" * 50 + "yz")
        assert found.hidden == {(2, "<|im_end|>"): 1, (2, "<think>"): 2}
        assert found.silent == {4: 1, 5: 1}
    assert scan(view.store, view.texts, most_tokens=1).documents == 1


def test_a_character_of_several_tokens_stands_with_the_last_of_them(tokenizer: Path, tmp_path: Path) -> None:
    texts = view_of(tokenizer, tmp_path, chat("a", "b"), max_length=9)[0].texts
    assert texts.of(np.frombuffer("a巴b".encode(), np.uint8)) == ["a", "巴", "b"]
    assert texts.of(np.frombuffer("巴".encode()[:2], np.uint8)) == ["\ufffd"]


# ---- where, and mistakes


def test_where_lists_every_row_of_a_reason(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "bad.jsonl"
    train.write_text("{x\n" + chat("Hi", "Hello") + "{y\n[]\n" + chat("w " * 900, "lost"), encoding="utf-8")
    changed = settings | {"data.train_path": train}
    listed = shown(capsys, changed, "--where=not_json").splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{train}:1", f"{train}:3"] and "{y" in listed[1]
    for reason in ("nothing_to_learn", "cut"):
        (line,) = shown(capsys, changed, f"--where={reason}").splitlines()
        assert line.startswith(f"{train}:5: ") and "768" in line
    said = refused(capsys, changed, "--where=odd")
    assert all(reason in said for reason in ("not_json", "not_an_object", "nothing_to_learn", "cut"))
    assert "duplicate" in refused(capsys, settings, "--where=odd")
    train.write_text(chat("Hi", "Hello"), encoding="utf-8")
    assert "none" in refused(capsys, changed, "--where=odd")


def test_what_fit_would_refuse_is_shown_and_said(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "bad.jsonl"
    train.write_text("{x\n" + chat("Hi", "Hello"), encoding="utf-8")
    said = shown(capsys, settings | {"data.train_path": train})
    assert "fit will refuse this: 1 of 2 lines are rejected" in said and "⟦Hello" in said
    train.write_text("{x\n", encoding="utf-8")
    said = shown(capsys, settings | {"data.train_path": train})
    assert "nothing can be learned: no document is left to train on (rejected: 1 not_json)" in said
    assert "data.max_tokens_per_batch is 5" in shown(capsys, settings, "--data.max_tokens_per_batch=5")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data.max_m": "4"}, "data.max_mb"),
        ({"data.batchsize": "4"}, "data.batch_size"),
        ({"data.batch_size": "many"}, "data.batch_size"),
        ({"row": "3"}, "rows"),
        ({"rows": "-1"}, "--rows is -1"),
        ({"data.train_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data.max_length": "1"}, "data.max_length"),
        ({"config": "nowhere.yaml"}, "sft.yaml"),
    ],
)
def test_mistakes_are_told_in_one_line(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], change: dict[str, str], says: str
) -> None:
    assert says in refused(capsys, settings | change)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data: {max_lenght: 4}", "data.max_length"),
        ("data: [1, 2]", "key: value"),
        ("- 1", "key: value"),
        ("data: {seed: 1", "odd.yaml"),
        ("data: {seed: 2024-01-01}", "odd.yaml"),
    ],
)
def test_mistakes_in_a_config_are_told_in_one_line(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    assert says in refused(capsys, settings, f"--config={tmp_path / 'odd.yaml'}")


def test_a_reader_that_has_seen_enough_and_an_ascii_output_are_no_errors(settings: dict[str, Any]) -> None:
    argv = [sys.executable, "-m", "minimind_sft", "inspect", *words(settings)]
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash, for a pipe that closes early")
    script = f"set -o pipefail; {' '.join(map(str, argv))} --rows 3 | head -n 1"
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, cwd=PROJECT)
    assert (done.returncode, done.stderr) == (0, "")
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    ascii_only = subprocess.run(argv, capture_output=True, text=True, cwd=PROJECT, env=environment, check=True).stdout
    assert "[[Hello there.<<<|im_end|>>>$\n" in ascii_only and "\\u6cd5" in ascii_only and "###" in ascii_only


def test_the_first_rows_are_those_of_the_sample(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "many.jsonl"
    train.write_text("".join(chat(f"Question {n}", f"Answer {n}") for n in range(200)), encoding="utf-8")
    assert main(["sample", str(train), str(tmp_path / "sample.jsonl"), "--max_mb", "0.005", "--seed", "7"]) == 0
    sample = (tmp_path / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = [json.loads(row)["conversations"][1]["content"] for row in sample[:4]]
    capsys.readouterr()
    said = shown(capsys, settings | {"data.train_path": train, "data.max_mb": "0.005", "data.seed": 7}, "--rows=4")
    assert re.findall(r"⟦(Answer \d+)", said) == wanted
