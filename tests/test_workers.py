"""Tokenizing in several processes: the same store, whatever the number, and none that stays behind."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minimind_sft import corpus, workers
from minimind_sft.chat import ChatTemplate
from minimind_sft.sampling import Line
from minimind_sft.stores import Stores

PROJECT = Path(__file__).resolve().parents[1]


def line(number: int) -> Line:
    answer = {"role": "assistant", "content": "word " * (number % 7)}
    chat = {"conversations": [{"role": "user", "content": f"Question {number}"}, answer]}
    row = chat if number % 5 else {"text": f"Document {number}.", "source": f"s{number % 3}"}
    return Line(f"file {number // 20}", number, "{" if number % 11 == 0 else json.dumps(row))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.from_folder(PROJECT / "data" / "tokenizer")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lines at a time, and workers from the first time on."""
    monkeypatch.setattr(workers, "TOGETHER", 3)
    monkeypatch.setattr(workers, "ALONE", 0)


def built(folder: Path, template: ChatTemplate, lines: list[Line], **options) -> str:
    """The hash of all that is in the store."""
    folder.mkdir()
    corpus.build(folder, lines, template=template, note=lambda taken: taken._asdict(), **options)
    assert len(list(folder.iterdir())) == 12
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()


def test_store_is_the_same_whatever_the_number_of_workers(tmp_path, template, several):
    lines = [line(number) for number in range(1, 60)]
    alone = built(tmp_path / "1", template, lines, workers=1)
    assert built(tmp_path / "2", template, lines, workers=2) == alone
    store = corpus.Store(tmp_path / "1")
    assert store.rejected["not_json"] == 5 and len(store) + sum(store.rejected.values()) == 59
    assert [row["line"] for row in store.rejections()] == sorted(row["line"] for row in store.rejections())


def test_cap_in_tokens_stops_at_the_same_line(tmp_path, template, several):
    lines = [line(number) for number in range(1, 60)]
    options = {"max_tokens": 500, "max_length": 20}
    alone = built(tmp_path / "1", template, lines, workers=1, **options)
    assert built(tmp_path / "2", template, lines, workers=2, **options) == alone
    note = corpus.Store(tmp_path / "1").meta["note"]
    assert note["stopped"] and 470 < note["tokens"] <= 500 and note["lines"] < 50


def test_long_lines_are_dealt_fewer_at_a_time(monkeypatch):
    monkeypatch.setattr(workers, "CHARACTERS", 100)
    lines = [Line("f", number, "x" * size) for number, size in enumerate((30, 30, 30, 30, 400, 1))]
    assert [[line.number for line in chunk] for chunk in workers._chunks(lines)] == [[0, 1, 2, 3], [4], [5]]
    assert list(map(len, workers._chunks([Line("f", 1, "")] * 1025))) == [512, 512, 1]


def test_what_the_template_drops_is_counted_here(tmp_path, template, several):
    turns = [{"role": "user", "content": "q", "name": "n"}, {"role": "assistant", "content": "a"}]
    lines = [Line("f", number, json.dumps({"messages": turns})) for number in range(12)]
    template.dropped.clear()
    built(tmp_path / "1", template, lines, workers=1)
    alone = template.dropped.copy()
    template.dropped.clear()
    built(tmp_path / "2", template, lines, workers=2)
    assert template.dropped == alone


def test_little_work_starts_no_worker(tmp_path, template, monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)
    monkeypatch.setattr(workers, "ALONE", 1e9)
    built(tmp_path / "1", template, [line(number) for number in range(100)], workers=2)
    with pytest.raises(TypeError):
        monkeypatch.setattr(workers, "ALONE", 0)
        built(tmp_path / "2", template, [line(1)], workers=2)


def die(texts: list[str]) -> None:
    os._exit(3)


def test_worker_that_dies_is_an_error_with_a_remedy(tmp_path, template, several, monkeypatch):
    monkeypatch.setattr(workers, "_work", die)
    with pytest.raises(ValueError, match="one of 2 processes that tokenize died.*data.workers"):
        built(tmp_path / "1", template, [line(number) for number in range(100)], workers=2)


PARENT = """
import itertools, multiprocessing, sys
from minimind_sft import corpus, workers
from minimind_sft.chat import ChatTemplate
from minimind_sft.sampling import Line
if __name__ == "__main__":
    workers.ALONE, workers.TOGETHER = 0, 1
    how = workers.Tokenization(ChatTemplate.from_folder(sys.argv[1]))
    lines = (Line("f", number, '{"text": "a"}') for number in itertools.count(1))
    for chunk, packed in workers.packed_lines(lines, how, workers=2):
        if chunk[0].number == 1:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked for in Linux's /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(PROJECT / "data" / "tokenizer")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in children)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_number_of_workers_is_a_setting(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(line(number).text + "\n" for number in range(1, 9)))
    asked = []

    def build(folder: Path, lines: list[Line], *, workers: int | None, **options) -> None:
        asked.append(workers)
        corpus.build_from_spans(folder, [[corpus.Span([1], True)]], 10, source="x")

    monkeypatch.setattr(corpus, "build", build)
    settings = {"train_path": str(path), "tokenizer": str(PROJECT / "data" / "tokenizer")}
    for number, wanted in enumerate((3, None)):
        Stores(**settings, workers=wanted, cache_dir=str(tmp_path / f"{number}")).train_store()
    assert asked == [3, None]
    with pytest.raises(ValueError, match="data.workers is 0"):
        Stores(**settings, workers=0, cache_dir=str(tmp_path / "cache"))


def test_two_threads_that_make_the_same_store_do_not_disturb_each_other(
    tmp_path: Path, template: ChatTemplate
) -> None:
    both = threading.Barrier(2, timeout=30)

    def make(folder: Path) -> None:
        both.wait()  # both are building now
        corpus.build(folder, [Line("t.jsonl", 1, '{"text": "a lake"}')], template=template)

    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda _: corpus.open_or_build(tmp_path / "cache", {"key": 1}, make), range(2)))
    assert [len(store) for store in stores] == [1, 1]
    assert len(list((tmp_path / "cache").iterdir())) == 1
