"""Several sources: a cap of its own for each, weights that divide the caps over all, and a plain list unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_sft import account
from minimind_sft.mixture import Part, parts_of
from minimind_sft.sampling import expand, main, rebuild, select
from minimind_sft.settings import SettingsParser
from minimind_sft.stores import Stores

PROJECT = Path(__file__).resolve().parents[1]
MEBIBYTE = 1024 * 1024


def write(path: Path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """400 lines of 10 bytes, the first of them a, and 100 of 40, the first of them b."""
    a = write(tmp_path / "a.jsonl", [f"a{number:9}" for number in range(400)])
    return a, write(tmp_path / "b.jsonl", [f"b{number:39}" for number in range(100)])


def drawn(*given: Any, max_mb: float | None = None, max_rows: int | None = None, seed: int = 4) -> list[str]:
    paths, parts = parts_of(list(given), expand, "data.train_path")
    return [line.text for line in select(paths, max_mb=max_mb, max_rows=max_rows, seed=seed, parts=parts)]


def of(source: str, lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(source)]


# ---- caps


def test_source_gives_what_a_sample_of_it_alone_has_whatever_stands_beside_it(files):
    a, b = files
    alone = drawn(a, max_mb=1005 / MEBIBYTE)
    assert len(alone) == 100
    for more in ({}, {"weight": 3}):
        mixed = drawn({"path": b} | more, {"path": a, "max_mb": 1005 / MEBIBYTE} | more, max_mb=1 if more else None)
        assert sorted(of("a", mixed)) == sorted(alone) and len(of("b", mixed)) == 100


def test_without_weights_and_caps_that_cut_nothing_is_the_plain_list(files):
    a, b = files
    for cap in (0.003, None):
        plain = drawn(a, b, max_mb=cap)
        assert drawn({"path": a}, {"path": b}, max_mb=cap) == plain == drawn({"path": [a, b]}, max_mb=cap)
        assert drawn({"path": a, "max_mb": 9}, b, max_mb=cap) == plain
    less = drawn({"path": a, "max_mb": 0.001}, b)
    assert less == [line for line in drawn(a, b) if line in less] and len(less) == 204


# ---- weights


def test_weights_are_shares_of_bytes_in_every_beginning_of_the_order(files):
    a, b = files
    order = drawn({"path": a, "weight": 1}, {"path": b, "weight": 3}, max_mb=1)
    assert len(order) == 500
    for count in range(1, 130):  # as long as b lasts: 4,000 bytes, beside 1,333 of a
        size_a, size_b = (sum(map(len, of(source, order[:count]))) for source in "ab")
        assert abs(size_b - 3 * size_a) <= 40
    mixed = drawn({"path": a, "weight": 1}, {"path": b, "weight": 3}, max_mb=4000 / MEBIBYTE)
    assert (len(of("a", mixed)), len(of("b", mixed))) == (100, 75)


def test_source_that_runs_out_leaves_its_share_to_the_others(files):
    a, b = files
    mixed = drawn({"path": a, "weight": 1}, {"path": b, "weight": 1, "max_mb": 410 / MEBIBYTE}, max_mb=3000 / MEBIBYTE)
    assert (len(of("a", mixed)), len(of("b", mixed))) == (260, 10)


def test_only_the_ratio_of_weights_counts(files):
    a, b = files
    first = drawn({"path": a, "weight": 1}, {"path": b, "weight": 2}, max_mb=0.002)
    assert first == drawn({"path": a, "weight": 8}, {"path": b, "weight": 16}, max_mb=0.002)
    assert first != drawn({"path": a, "weight": 2}, {"path": b, "weight": 1}, max_mb=0.002)


SOURCE = st.fixed_dictionaries({"max_mb": st.none() | st.integers(40, 3000).map(lambda size: size / MEBIBYTE)})


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=30), SOURCE), min_size=1, max_size=4),
       weighted=st.booleans(), weights=st.lists(st.integers(1, 9), min_size=4, max_size=4), seed=st.integers(0, 9),
       caps=st.lists(st.integers(0, 600), min_size=2, max_size=2), rows=st.none() | st.integers(1, 20))  # fmt: skip
def test_smaller_caps_sample_is_the_beginning_of_a_larger_ones(
    tmp_path_factory, parts, weighted, weights, seed, caps, rows
):
    folder = tmp_path_factory.mktemp("mixture")
    given = [
        {"path": write(folder / f"{number}.jsonl", ["x" * size for size in sizes])}
        | options
        | ({"weight": weights[number]} if weighted else {})
        for number, (sizes, options) in enumerate(parts)
    ]
    small, large = (drawn(*given, max_mb=cap / MEBIBYTE, seed=seed) for cap in sorted(caps))
    assert small == large[: len(small)]
    assert drawn(*given, max_mb=max(caps) / MEBIBYTE, max_rows=rows, seed=seed) == large[:rows]
    assert sum(map(len, large)) <= max(caps)


# ---- what is refused


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.jsonl", "max_m": 3}, "'max_m' is no key of a source; did you mean max_mb?"),
        ({"max_mb": 3}, "path is None in"),
        ({"path": "a.jsonl", "weight": 0}, "weight of a.jsonl is 0; give a number above 0"),
        ({"path": "a.jsonl", "weight": True}, "weight of a.jsonl is True"),
        ({"path": "a.jsonl", "max_mb": "8"}, "max_mb of a.jsonl is '8'"),
        ({"path": "a.jsonl", "max_mb": float("inf")}, "max_mb of a.jsonl is inf"),
        ({"path": "a.jsonl", "weight": 2}, "b.jsonl has no weight, and others have one"),
    ],
)
def test_wrong_sources_are_refused_with_a_remedy(entry, message):
    with pytest.raises(ValueError, match=rf"^data\.train_path: .*{message}"):
        parts_of([entry, "b.jsonl"], lambda path: [Path("x")], "data.train_path")


def test_cap_that_leaves_nothing_of_a_source_is_refused(files):
    a, b = files
    with pytest.raises(ValueError, match=r"nothing of .*b\.jsonl is selected: its first line has 40 bytes.*allows 30"):
        drawn(a, {"path": b, "max_mb": 30 / MEBIBYTE})


# ---- in a run


def chat(text: str) -> str:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    return json.dumps({"conversations": turns})


def test_run_notes_its_sources_and_rebuilds_from_the_note(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [chat(f"a{number:04}") for number in range(200)])
    b = write(tmp_path / "b.jsonl", [chat(f"b{number:04}") for number in range(200)])
    c = write(tmp_path / "c.jsonl", [chat(f"c{number:04}") for number in range(200)])
    size = len(chat("a0000"))

    def stores(*train: Any, **more: Any) -> Stores:
        return Stores(train_path=list(train), tokenizer=str(PROJECT / "data" / "tokenizer"),
                      cache_dir=str(tmp_path / "cache"), **{"max_mb": None, **more})  # fmt: skip

    mixture = [{"path": [a, b], "weight": 1, "max_mb": 1}, {"path": c, "weight": 2}]
    run = stores(*mixture, max_mb=size * 90.5 / MEBIBYTE)
    dealt = run.documents(run.open(train=True))
    note = dealt.train.store.meta["note"]
    assert note["sources"] == [
        {"name": f"{a}, {b}", "files": 2, "max_mb": 1, "weight": 1, "selected": 30, "bytes": 30 * size},
        {"name": c, "files": 1, "max_mb": None, "weight": 2, "selected": 60, "bytes": 60 * size},
    ]
    assert account.chosen(dealt).endswith(f"; 30 lines, 33.3% of {a}, {b}; 60 lines, 66.7% of {c}")
    (tmp_path / "sample.json").write_text(json.dumps(account.sums(dealt)))
    rebuild(tmp_path / "sample.json", tmp_path / "again.jsonl")
    again = (tmp_path / "again.jsonl").read_text().splitlines()
    assert len(again) == 90 and sum('"c0' in line for line in again) == 60
    assert main(["--manifest", str(tmp_path / "again.jsonl.manifest.json")]) == 0
    folders = {
        stores(*train, max_mb=cap).train_store().folder
        for train, cap in ((mixture, 1), ([a, b, c], 1), ([{"path": a, "max_mb": 0.001}, b, c], 1),
                           ([{"path": a, "max_mb": 0.001}, b, c], None))
    }  # fmt: skip
    assert len(folders) == 4  # the cache keeps them apart
    capped = stores({"path": a, "max_mb": 0.001}, b).train_store()
    assert capped.meta["note"]["tightest"] == "end" and len(capped) == 200 + int(0.001 * MEBIBYTE) // size
    few = stores(*mixture, max_tokens=400).train_store().meta["note"]
    lines, doubled = (source["selected"] for source in few["sources"])
    assert lines + doubled == few["selected"] and abs(doubled - 2 * lines) <= 2 and lines > 2
    with pytest.raises(ValueError, match="weights, which divide a cap over all"):
        stores(*mixture).train_store()


def test_command_line_and_yaml_take_sources(tmp_path, files):
    a, b = files
    (tmp_path / "c.yaml").write_text(f"data:\n  train_path:\n  - path: {a}\n    max_mb: 8\n  - {b}\n  tokenizer: t")
    words = ["--data.tokenizer=t", f"--data.train_path=[{{path: {a}, max_mb: 8}}, {b}]"]
    for argv in ([f"--config={tmp_path / 'c.yaml'}"], words):
        read = SettingsParser("inspect", "").read(argv).data.train_path
        expected = [Part(a, 1, 8, None), Part(b, 1, None, None)]
        assert parts_of(read, expand, "data.train_path") == ([Path(a), Path(b)], expected)
