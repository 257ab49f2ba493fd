"""Parquet: each row is the line of its columns, wherever a line is."""

import json
import sys
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path

import pytest

from minimind_sft import parquet
from minimind_sft.files import Files
from minimind_sft.sampling import expand, main, read_lines, sample, select
from minimind_sft.sources import Source
from minimind_sft.stores import Stores

PROJECT = Path(__file__).resolve().parents[1]
MISSING = "pyarrow (the extra parquet) is not installed"


def write(path: Path, rows: list[dict], **options) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason=MISSING)
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def chat(number: int) -> dict:
    answer = {"role": "assistant", "content": "Yes."} | ({"train": False} if number % 2 else {})
    return {"conversations": [{"role": "user", "content": f"Hi {number}\n你好"}, answer]}


def test_rows_become_lines_without_what_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 2)
    path = write(tmp_path / "in.parquet", [chat(number) for number in range(7)], row_group_size=3)
    found = list(read_lines([path]))
    assert [json.loads(line.text) for line in found] == [chat(number) for number in range(7)]
    assert [line.number for line in found] == [1, 2, 3, 4, 5, 6, 7]
    assert found[1].text.startswith('{"conversations": [{"role": "user", "content": "Hi 1\\n你好"}')  # no escapes


def test_values_that_json_does_not_have_are_text(tmp_path):
    row = {"a": date(2026, 1, 2), "b": datetime(2026, 1, 2, 3, tzinfo=timezone.utc), "c": Decimal("1.50"), "d": b"\xe4",
           "e": b"x", "f": [None, {"g": None, "h": 1}], "i": None, "j": float("nan")}  # fmt: skip
    (line,) = read_lines([write(tmp_path / "in.parquet", [row])])
    assert json.loads(line.text) == {
        "a": "2026-01-02", "b": "2026-01-02T03:00:00+00:00", "c": "1.50", "d": "\ufffd", "e": "x", "f": [None, {"h": 1}]
    }  # fmt: skip


def test_parquet_is_seen_in_the_content_and_looked_for_in_folders(tmp_path):
    path = write(tmp_path / "a.parquet", [{"text": "one"}])
    assert expand(tmp_path) == [path] and Source.of(path.rename(tmp_path / "a.bin")).layout == "parquet"


def test_sample_is_that_of_the_rows_as_lines(tmp_path):
    path = write(tmp_path / "in.parquet", [{"text": f"Document {number}."} for number in range(600)])
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(line.text + "\n" for line in read_lines([path])))
    calls = []
    made = sample(path, tmp_path / "a.jsonl", max_mb=0.01, seed=5, progress=lambda *call: calls.append(call))
    sample(lines, tmp_path / "b.jsonl", max_mb=0.01, seed=5)
    assert made["lines_seen"] == 600 and 0 < made["selected"] < 600
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    size = path.stat().st_size
    assert calls == sorted(calls) and calls[-1] == (size, size)
    assert main(["--manifest", str(tmp_path / "a.jsonl.manifest.json"), str(tmp_path / "c.jsonl")]) == 0
    assert Files(tmp_path / "cache").facts([path])[0].text_bytes == lines.stat().st_size


def test_stores_name_the_row(tmp_path):
    path = write(tmp_path / "in.parquet", [chat(0), {}, chat(1)])
    stores = Stores(train_path=str(path), tokenizer=str(PROJECT / "data" / "tokenizer"), max_bad_ratio=1.0,
                    cache_dir=str(tmp_path / "cache"))  # fmt: skip
    dealt = stores.documents(stores.open(train=True))
    assert [(row["file"], row["line"], row["reason"]) for row in dealt.rejections()] == [
        (str(path), 2, "unknown_format"), (str(path), 3, "nothing_to_learn")
    ]  # fmt: skip


def test_damage_and_columns_of_one_name_are_errors_that_name_the_file(tmp_path):
    path = write(tmp_path / "in.parquet", [{"text": f"Document {number}."} for number in range(600)])
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:300] + bytes(300) + whole[600:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"in\.parquet cannot be read as Parquet \(.*make it again"):
            select([path], max_mb=None, seed=0)
    import pyarrow
    from pyarrow.parquet import write_table

    for value in (pyarrow.array([1], pyarrow.timestamp("ns")), pyarrow.array([b"\xff"]).cast("string", safe=False)):
        write_table(pyarrow.table([value], names=["a"]), path)
        with pytest.raises(ValueError, match=r"in\.parquet cannot be read as Parquet"):
            list(read_lines([path]))
    write_table(pyarrow.table([[1], [2]], names=["a", "a"]), path)
    with pytest.raises(ValueError, match=r"in\.parquet: two columns are called 'a'"):
        list(read_lines([path]))


def test_without_pyarrow_one_line_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    assert main([str(path), str(tmp_path / "out.jsonl")]) == 2
    printed = capsys.readouterr().err
    assert "in.parquet is a Parquet file: `pip install pyarrow` (the extra parquet) to read it" in printed
    assert printed.count("\n") == 1


def test_a_sample_is_not_called_parquet(tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="plain lines"):
        sample(tmp_path / "in.jsonl", tmp_path / "out.parquet", max_mb=None, seed=0)


def test_size_is_estimated_without_reading_the_rows(tmp_path):
    path = write(tmp_path / "in.parquet", [{"text": f"{number} " + "word " * 200} for number in range(50)])
    assert path.stat().st_size < parquet.estimated_bytes(path) and 50_000 < parquet.estimated_bytes(path) < 60_000
    assert parquet.estimated_bytes(Path(__file__)) == 0
