"""Sampling: the original's bytes, on any input, without the file in memory; and errors that say what to do."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind_sft import lines, readers, selection, sources
from minimind_sft.sampling import Line, expand, main, manifest_path, read_lines, rebuild, sample, select
from minimind_sft.shuffle import shuffled_indices

MEBIBYTE = 1024 * 1024


def reference(path: Path, max_mb: float | None, seed: int) -> list[str]:
    """What the original takes, in its own plain way."""
    with path.open(encoding="utf-8") as file:
        shuffled = file.readlines()
    random.Random(seed).shuffle(shuffled)
    taken, total = [], 0
    for line in filter(None, map(str.strip, shuffled)):
        total += len(line.encode())
        if max_mb is not None and total > max_mb * MEBIBYTE:
            break
        taken.append(line)
    return taken


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(chosen) -> list[str]:
    return [line.text for line in chosen]


@pytest.fixture(params=[1, 2, 3, 7, 1 << 19])
def chunk(request, monkeypatch) -> int:
    """Bytes read at a time: boundaries fall everywhere."""
    monkeypatch.setattr(sources, "CHUNK", request.param)
    return request.param


# ---- the original's bytes


def test_golden_samples_have_the_same_bytes(shared, tmp_path):
    folder = shared / "golden" / "sampling"
    cases = json.loads((folder / "expected.json").read_text())
    assert len(cases) == 22
    for case in cases:
        path = shared / case["input"] if case["input"].startswith("data/") else folder / case["input"]
        made = sample(path, tmp_path / "out.jsonl", max_mb=case["max_mb"], seed=case["seed"])
        assert (made["selected"], made["bytes"]) == (case["lines"], case["bytes"]), case
        assert made["output"]["sha256"] == case["sha256"], case
        assert hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest() == case["sha256"], case


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("size", [499, 1 << 19])
def test_golden_file_is_reproduced_whatever_the_chunk_size(shared, tmp_path, monkeypatch, size, number):
    folder = shared / "golden" / "sampling"
    monkeypatch.setattr(sources, "CHUNK", size)
    sample(folder / f"adversarial_{number}.jsonl", tmp_path / "out.jsonl", max_mb=0.01, seed=42)
    expected = (folder / f"adversarial_{number}.expected_0.01mb_seed42.jsonl").read_bytes()
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_order_and_stop_of_a_file_worked_out_by_hand(tmp_path):
    """random.Random(42) shuffles five elements to 3, 1, 2, 4, 0 (Python's documentation guarantees the sequence)."""
    path = write(tmp_path / "five.jsonl", "aaaaaaaa\nbb\n \nd\neeeeee\n")
    assert texts(select([path], max_mb=None, seed=42)) == ["d", "bb", "eeeeee", "aaaaaaaa"]
    # 3 bytes: d and bb fit, the blank line is skipped, eeeeee would pass the cap and ends it.
    assert texts(select([path], max_mb=3 / MEBIBYTE, seed=42)) == ["d", "bb"]
    assert texts(select([path], max_mb=8 / MEBIBYTE, seed=42)) == ["d", "bb"]
    assert texts(select([path], max_mb=9 / MEBIBYTE, seed=42)) == ["d", "bb", "eeeeee"]
    # 16 bytes: after 9 bytes aaaaaaaa (8) would pass the cap
    assert texts(select([path], max_mb=16 / MEBIBYTE, seed=42)) == ["d", "bb", "eeeeee"]


PIECES = st.sampled_from(
    [
        "a",
        "bb",
        "你好",
        "\U0001f642",
        "é",
        " ",
        "\t",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
        "\ufeff",
        "\0",
        "\x0b",
    ]
    + ["\n", "\r", "\r\n", "\n\n", "\n\r", "\r\r\n"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(PIECES, min_size=1, max_size=60).map("".join),
    seed=st.integers(-5, 2**40),
    cap=st.one_of(st.none(), st.integers(0, 60)),
    size=st.integers(1, 12),
    compressed=st.booleans(),
)
def test_any_text_gives_what_the_original_takes(tmp_path, monkeypatch, content, seed, cap, size, compressed):
    monkeypatch.setattr(sources, "CHUNK", size)
    monkeypatch.setattr(selection, "CHUNK", size)
    plain = write(tmp_path / "in.jsonl", content)
    path = write(tmp_path / "in.gz", gzip.compress(content.encode())) if compressed else plain
    max_mb = None if cap is None else cap / MEBIBYTE
    expected = reference(plain, max_mb, seed)
    chosen = select([path], max_mb=max_mb, seed=seed)
    assert texts(chosen) == expected
    with plain.open(encoding="utf-8") as file:
        every = file.readlines()
    assert chosen.lines_seen == len(every)
    assert chosen.blank == sum(not line.strip() for line in every)
    assert chosen.bytes == sum(len(line.encode()) for line in expected)
    assert all(every[line.number - 1].strip() == line.text for line in chosen)
    assert [line.text for line in read_lines([path])] == [line.strip() for line in every if line.strip()]


def test_newlines_are_those_of_text_mode_also_where_two_chunks_meet(tmp_path, chunk):
    path = write(tmp_path / "in.jsonl", "one\r\ntwo\rthree\n\r\nfour\u2028still four\x85\n\rsix")
    assert [(line.number, line.text) for line in read_lines([path])] == [
        (1, "one"),
        (2, "two"),
        (3, "three"),
        (5, "four\u2028still four"),
        (7, "six"),
    ]
    chosen = select([path], max_mb=None, seed=0)
    assert (chosen.lines_seen, chosen.blank) == (7, 2)
    assert sorted(chosen) == sorted(read_lines([path]))


def test_byte_order_mark_stays_part_of_the_text(tmp_path):
    path = write(tmp_path / "in.jsonl", b"\xef\xbb\xbf{}\n")
    assert texts(select([path], max_mb=None, seed=0)) == ["\ufeff{}"]


def test_several_files_count_as_one_in_the_order_given(tmp_path):
    parts = [write(tmp_path / "b.jsonl", "1\n2"), write(tmp_path / "a.jsonl", "3\n\n4\n5")]
    parts.append(write(tmp_path / "c.gz", gzip.compress(b"6\n7")))
    whole = write(tmp_path / "whole.jsonl", "1\n2\n3\n\n4\n5\n6\n7\n")
    for seed in range(20):
        apart, together = select(parts, max_mb=None, seed=seed), select([whole], max_mb=None, seed=seed)
        assert texts(apart) == texts(together)
        assert (apart.lines_seen, apart.blank, apart.bytes) == (8, 1, 7)
    assert Line(str(parts[1]), 3, "4") in list(apart)
    assert Line(str(parts[2]), 2, "7") in list(apart)


def test_more_files_than_may_be_open_at_once(tmp_path):
    parts = [write(tmp_path / f"{number:03}.jsonl", f"{number} a\n{number} b\n") for number in range(150)]
    expected = [f"{number} {letter}" for number in range(150) for letter in "ab"]
    random.Random(5).shuffle(expected)
    chosen = select(parts, max_mb=None, seed=5)
    assert texts(chosen) == expected
    if Path("/proc/self/fd").exists():
        before = len(os.listdir("/proc/self/fd"))
        blocks = chosen.blocks()
        next(blocks)
        assert len(os.listdir("/proc/self/fd")) <= before + readers.OPEN_FILES
        blocks.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_smaller_caps_sample_is_the_beginning_of_a_larger_ones(tmp_path):
    path = write(tmp_path / "in.jsonl", "".join("x" * (number % 50) + "\n" for number in range(1000)))
    whole = texts(select([path], max_mb=None, seed=3))
    assert len(whole) == 980
    for kilobytes in (0, 1, 2, 5, 10):
        part = texts(select([path], max_mb=kilobytes / 1024, seed=3))
        assert part == whole[: len(part)]
    assert texts(select([path], max_mb=None, max_rows=7, seed=3)) == whole[:7]


def test_the_tighter_cap_wins_and_is_named(tmp_path):
    path = write(tmp_path / "in.jsonl", "aa\n" * 10)
    named = {
        (None, None): ("end", 10),
        (4 / MEBIBYTE, None): ("max_mb", 2),
        (4 / MEBIBYTE, 5): ("max_mb", 2),
        (10 / MEBIBYTE, 3): ("max_rows", 3),
        (None, 3): ("max_rows", 3),
        (1.0, 10): ("end", 10),
        (4 / MEBIBYTE, 2): ("max_rows", 2),  # both at once
    }
    for (max_mb, max_rows), expected in named.items():
        chosen = select([path], max_mb=max_mb, max_rows=max_rows, seed=0)
        assert (chosen.stopped_by, chosen.selected) == expected


# ---- compressed input


def test_gzip_gives_the_same_as_plain_also_in_several_members(tmp_path):
    content = "".join(f"line {number} 你好\n" for number in range(5000)).encode()
    plain, packed = write(tmp_path / "in.jsonl", content), tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(content[:30_001]) + gzip.compress(content[30_001:]))
    for max_mb in (0.01, None):
        assert texts(select([packed], max_mb=max_mb, seed=1)) == texts(select([plain], max_mb=max_mb, seed=1))
    chosen = select([packed], max_mb=0.01, seed=1)
    assert list(chosen) == list(chosen)  # any number of times
    assert chosen.inputs[0]["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()


def test_compression_is_seen_in_the_content_and_not_in_the_name(tmp_path):
    path = write(tmp_path / "in.jsonl", gzip.compress(b"a\nb\n"))
    assert sorted(texts(select([path], max_mb=None, seed=1))) == ["a", "b"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "trailing"])
def test_damaged_gzip_is_an_error_that_names_the_file(tmp_path, damage):
    packed = bytearray(gzip.compress(os.urandom(3000).hex().encode()))
    if damage == "flipped":
        packed[len(packed) // 2] ^= 0xFF
    content = {"cut": packed[:-900], "flipped": packed, "trailing": packed + b"garbage"}[damage]
    path = write(tmp_path / "in.jsonl.gz", bytes(content))
    with pytest.raises(ValueError, match=r"in\.jsonl\.gz is damaged or cut off"):
        select([path], max_mb=None, seed=1)
    with pytest.raises(ValueError, match=r"in\.jsonl\.gz is damaged or cut off"):
        list(read_lines([path]))


def test_zstd_is_read_frame_by_frame(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is optional and not installed")
    content = "".join(f"line {number}\n" for number in range(100_000)).encode()
    packed = zstandard.compress(content[:77_777]) + zstandard.compress(content[77_777:])
    path, plain = write(tmp_path / "in.jsonl.zst", packed), write(tmp_path / "in.jsonl", content)
    assert texts(select([path], max_mb=0.1, seed=1)) == texts(select([plain], max_mb=0.1, seed=1))
    with pytest.raises(ValueError, match="damaged or cut off"):
        select([write(path, packed[:-100])], max_mb=None, seed=1)


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(tmp_path / "in.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(9))
    with pytest.raises(ValueError, match="pip install zstandard"):
        select([path], max_mb=None, seed=1)


# ---- the parts


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 4095, 4096, 4097, 70_001])
@pytest.mark.parametrize("seed", [0, 42, -3, 2**70])
def test_permutation_is_pythons(count, seed):
    expected = list(range(count))
    random.Random(seed).shuffle(expected)
    assert shuffled_indices(count, seed).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 3000), seed=st.integers(0, 2**32))
def test_permutation_is_pythons_for_any_count_and_seed(count, seed):
    expected = list(range(count))
    random.Random(seed).shuffle(expected)
    assert shuffled_indices(count, seed).tolist() == expected


def accepts(data: bytes) -> bool:
    size = len(data)
    dirty = b"\1" * 8 * (size // 8 + 2)  # what is left of the piece before must not matter
    return lines.is_utf8(bytearray(data), size, bytearray(dirty), bytearray(dirty))


def decodes(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def test_validator_agrees_with_python_on_every_lead_byte_at_its_limits():
    seconds = (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xE4, 0xFF)
    tails = (b"", b"\x80", b"\x80\x80", b"\xbf\xbf", b"\x80\x80\x80", b"a", b"\x80a")
    for lead in range(256):
        for data in [bytes([lead, second]) + tail for second in seconds for tail in tails] + [bytes([lead])]:
            assert accepts(data) == decodes(data), data
            assert accepts("é你\U0001f642".encode() + data) == decodes(data), data


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(min_size=1, max_size=80), at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 4)
)
def test_validator_agrees_with_python_on_text_with_one_byte_changed(text, at, byte, cut):
    data = bytearray(text.encode())
    assert accepts(bytes(data))
    data[at % len(data)] = byte
    data = data[: max(1, len(data) - cut)]
    assert accepts(bytes(data)) == decodes(bytes(data))


def test_validator_does_not_tire_of_rare_characters():
    """More four-byte characters, and more E0 and ED lead bytes, than it looks at one by one."""
    for character in ("\U0001f642", "\u0939", "\ud7a3"):
        data = (character * 1000).encode()
        assert accepts(data)
        size = len(character.encode())
        assert not accepts(data[:-size] + b"\xf4\x90\x80\x80")
        assert not accepts(data[: -2 * size] + b"\xed\xa0\x80" + data[:size])
        assert not accepts(data + b"\xe0\x80\x80")
        assert not accepts(data[:-1])


def test_table_of_white_space_is_complete():
    assert [white.decode() for white in lines.WHITE] == [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()]


def test_lines_longer_than_a_chunk_are_measured_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 100)
    long = "\u3000" * 200 + "é" * 1000 + " " * 500 + "x" * 301 + "\xa0" * 150
    path = write(tmp_path / "in.jsonl", f"{long}\nshort\n{' ' * 777}\n{long}")
    chosen = select([path], max_mb=None, seed=0)
    assert (chosen.lines_seen, chosen.blank, chosen.bytes) == (4, 1, 2 * 2801 + 5)
    assert sorted(texts(chosen)) == sorted([long.strip(), long.strip(), "short"])


# ---- what comes in


def test_paths_expand_in_order(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", "notes.txt"):
        write(tmp_path / name, "x")
    (tmp_path / "deep.jsonl").mkdir()
    folder = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz")]
    assert expand(tmp_path) == folder
    assert expand(str(tmp_path / "*.jsonl")) == folder[:2]
    assert expand([folder[1], str(folder[0])]) == [folder[1], folder[0]]
    monkeypatch.chdir(tmp_path)
    assert expand("notes.txt") == [Path("notes.txt")]


def test_a_folder_is_taken_whole_or_not_at_all(tmp_path):
    (tmp_path / "A.JSONL").write_text("1\n")
    (tmp_path / "b.jsonl").write_text("2\n")
    assert [path.name for path in expand(tmp_path)] == ["A.JSONL", "b.jsonl"]
    (tmp_path / "c.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(ValueError, match=r"c\.jsonl is a link to gone\.jsonl, which is not there: mend or remove it"):
        expand(tmp_path)
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "1.json").write_text('{\n"messages": []\n}')
    with pytest.raises(ValueError, match=r"every \.json in this folder is a single object"):
        expand(tmp_path / "objects")


def test_a_name_that_is_no_text_is_refused(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xc4\xe3.jsonl")  # GBK, as from an old archive
    Path(path).write_text("1\n")
    for named in (path, tmp_path):
        with pytest.raises(ValueError, match=r"is not UTF-8, as of a file from an old archive: rename it"):
            expand(named)


def test_a_folder_is_refused_where_folders_below_it_hold_more(tmp_path):
    top, below = write(tmp_path / "a.jsonl", "x"), tmp_path / "more" / "still"
    below.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    write(below / "tokenizer.json", "{}")
    write(tmp_path / ".git" / "b.jsonl", "x")
    assert expand(tmp_path) == [top]
    deep = write(below / "b.jsonl", "x")
    with pytest.raises(ValueError, match=r"more in folders below it, such as .*b\.jsonl.* name '.*/\*\*/\*\.jsonl'"):
        expand(tmp_path)
    assert expand(f"{tmp_path}/**/*.jsonl") == [top, deep]


def test_a_table_of_a_spreadsheet_is_no_file_of_lines(tmp_path):
    with pytest.raises(ValueError, match=r"chats\.csv is a \.csv file; what is read are JSON lines.*to_json"):
        expand(write(tmp_path / "chats.csv", "question,answer\n"))


def test_utf16_is_told_from_other_bytes(tmp_path):
    for encoding, name in (("utf-16", "UTF-16"), ("gb18030", "GB18030")):
        path = write(tmp_path / "in.jsonl", '{"text": "你好"}\n'.encode(encoding))
        with pytest.raises(ValueError, match=f"line 1: byte .*`iconv -f {name} -t UTF-8`"):
            list(read_lines([path]))


def test_a_name_with_glob_characters_is_a_file_first(tmp_path):
    path = write(tmp_path / "chats [v1].jsonl", "x")
    assert expand(str(path)) == [path]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("absent.jsonl", "absent.jsonl does not exist.*check the path"),
        ("absent*.jsonl", r"absent\*.jsonl matches no file.*check the pattern"),
        ("folder", r"folder is a folder without \*.jsonl"),
        ("empty.jsonl", r"empty.jsonl is empty \(0 bytes\)"),
        (["good.jsonl", "empty.jsonl"], r"empty.jsonl is empty"),
        ([], "no input file is given"),
        ("", "'' is not a path"),
    ],
)
def test_unusable_paths_are_named_with_a_remedy(tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "good.jsonl", "x")
    with pytest.raises(ValueError, match=message):
        expand(value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_because_it_is_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        select(expand(tmp_path / "pipe"), max_mb=None, seed=0)


@pytest.mark.parametrize("bad", [b"\xff", b"\xe4\xbd", b"\xed\xa0\x80", b"\xc0\x80", "中文".encode("gb18030")])
@pytest.mark.parametrize("packed", [False, True])
def test_invalid_utf8_is_named_by_file_and_line(tmp_path, chunk, bad, packed):
    content = "é\r\n\r好\n".encode() + b"x" + bad + b"\nlast\n"
    first = write(tmp_path / "first.jsonl", "1\n2\n")
    path = write(tmp_path / "in.jsonl", gzip.compress(content) if packed else content)
    for attempt in (lambda: select([first, path], max_mb=None, seed=0), lambda: list(read_lines([first, path]))):
        with pytest.raises(ValueError, match=r"in\.jsonl, line 4: byte 0x.. is not valid UTF-8.*iconv"):
            attempt()


def test_invalid_utf8_at_the_very_end_is_found(tmp_path, chunk):
    path = write(tmp_path / "in.jsonl", "好\n好".encode()[:-1])
    with pytest.raises(ValueError, match="line 2"):
        select([path], max_mb=None, seed=0)


def test_file_that_changes_between_the_passes_is_an_error(tmp_path):
    path = write(tmp_path / "in.jsonl", "aaa\nbbb\n")
    chosen = select([path], max_mb=None, seed=0)
    assert len(list(chosen)) == 2
    write(path, "aaa\nbbb\nccc\n")
    with pytest.raises(ValueError, match=r"in\.jsonl changed while it was being read"):
        list(chosen)
    path.unlink()
    with pytest.raises(ValueError, match=r"in\.jsonl changed while it was being read"):
        list(chosen)


def test_file_that_grows_while_it_is_scanned_is_an_error(tmp_path):
    path = write(tmp_path / "in.jsonl", "aaa\nbbb\n")

    def append(done: int, total: int) -> None:
        with path.open("a") as file:
            file.write("x" * (total == 8))

    with pytest.raises(ValueError, match=r"in\.jsonl changed while it was being read"):
        select([path], max_mb=None, seed=0, progress=append)


def test_file_that_is_rewritten_while_it_is_read_is_an_error(tmp_path):
    path = write(tmp_path / "in.jsonl", "aaa\nbbb\n")
    with pytest.raises(ValueError, match=r"in\.jsonl changed while it was being read"):
        select([path], max_mb=None, seed=0, progress=lambda done, total: os.utime(path, ns=(0, 0)))
    reading = read_lines([path])
    assert next(reading).text == "aaa"
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"in\.jsonl changed while it was being read"):
        list(reading)


@pytest.mark.parametrize(("max_mb", "max_rows"), [(-1, None), (float("nan"), None), (float("inf"), None), (None, -1)])
def test_caps_that_are_none_are_refused(tmp_path, max_mb, max_rows):
    path = write(tmp_path / "in.jsonl", "a\n")
    with pytest.raises(ValueError, match="or null for no cap"):
        select([path], max_mb=max_mb, max_rows=max_rows, seed=0)


def test_empty_selection_says_why_and_its_remedy_works(tmp_path):
    path = write(tmp_path / "in.jsonl", "x" * 5000 + "\n")
    chosen = select([path], max_mb=0.001, seed=0)
    with pytest.raises(ValueError, match=r"in\.jsonl: .*5,000 bytes; max_mb 0.001 allows 1,048") as raised:
        chosen.require_some()
    enough = float(str(raised.value).split("Raise max_mb to ")[1].split()[0])
    select([path], max_mb=enough, seed=0).require_some()
    with pytest.raises(ValueError, match="max_rows is 0"):
        select([path], max_mb=None, max_rows=0, seed=0).require_some()
    with pytest.raises(ValueError, match="all 3 lines are blank"):
        select([write(path, " \n\n\t")], max_mb=None, seed=0).require_some()


def test_progress_reaches_the_end(tmp_path):
    calls = []
    parts = [write(tmp_path / "a.jsonl", "a\n" * 50), write(tmp_path / "b.gz", gzip.compress(b"b\n" * 50))]
    select(parts, max_mb=None, seed=0, progress=lambda done, total: calls.append((done, total)))
    total = sum(part.stat().st_size for part in parts)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


# ---- what goes out


def test_manifest_says_what_the_sample_was_made_from(tmp_path):
    path = write(tmp_path / "in.jsonl", "aa\nbb\n \ncc\n")
    made = sample(path, tmp_path / "new" / "out.jsonl", max_mb=4 / MEBIBYTE, seed=7)
    written = (tmp_path / "new" / "out.jsonl").read_bytes()
    assert written == "".join(text + "\n" for text in reference(path, 4 / MEBIBYTE, 7)).encode()
    assert made == {
        "inputs": [{"name": str(path), "size": 11, "sha256": hashlib.sha256(b"aa\nbb\n \ncc\n").hexdigest()}],
        "max_mb": 4 / MEBIBYTE,
        "max_rows": None,
        "seed": 7,
        "lines_seen": 4,
        "blank": 1,
        "selected": 2,
        "bytes": 4,
        "stopped_by": "max_mb",
        "output": {
            "name": str(tmp_path / "new" / "out.jsonl"),
            "size": 6,
            "sha256": hashlib.sha256(written).hexdigest(),
        },
    }
    assert json.loads((tmp_path / "new" / "out.jsonl.manifest.json").read_text()) == made
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == ["out.jsonl", "out.jsonl.manifest.json"]


def test_only_a_sample_of_ours_is_replaced_unasked(tmp_path):
    path, out = write(tmp_path / "in.jsonl", "aa\nbb\n"), tmp_path / "out.jsonl"
    sample(path, out, max_mb=1, seed=0)
    sample(path, out, max_mb=1, seed=1)  # again: it can be rebuilt from its manifest
    write(out, "xx\nyy\n")  # the same size
    with pytest.raises(ValueError, match=r"out\.jsonl exists.*--overwrite"):
        sample(path, out, max_mb=1, seed=0)
    write(out, "written by hand\n")
    with pytest.raises(ValueError, match=r"out\.jsonl exists.*--overwrite"):
        sample(path, out, max_mb=1, seed=0)
    assert out.read_text() == "written by hand\n"
    sample(path, out, max_mb=1, seed=0, overwrite=True)
    with pytest.raises(ValueError, match=r"in\.jsonl is one of the inputs"):
        sample([out, path], path, max_mb=1, seed=0, overwrite=True)
    with pytest.raises(ValueError, match="is a folder"):
        sample(path, tmp_path, max_mb=1, seed=0)
    with pytest.raises(ValueError, match="plain lines"):
        sample(path, tmp_path / "out.jsonl.gz", max_mb=1, seed=0)


def test_a_failure_leaves_the_old_sample_and_nothing_else(tmp_path, monkeypatch):
    path, out = write(tmp_path / "in.jsonl", "aa\nbb\n"), tmp_path / "out.jsonl"
    sample(path, out, max_mb=1, seed=0)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        sample(path, out, max_mb=1, seed=1)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_rebuilding_from_the_manifest_gives_the_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path, out = (
        write(tmp_path / "data" / "in.jsonl", "".join(f"{n}\n" for n in range(100))),
        tmp_path / "data" / "out.jsonl",
    )
    monkeypatch.chdir(tmp_path)
    sample("data/in.jsonl", "data/out.jsonl", max_mb=50 / MEBIBYTE, max_rows=20, seed=9)
    expected = out.read_bytes()
    out.unlink()
    rebuild("data/out.jsonl.manifest.json")
    assert out.read_bytes() == expected
    rebuild(manifest_path(out), tmp_path / "copy.jsonl")
    assert (tmp_path / "copy.jsonl").read_bytes() == expected
    monkeypatch.chdir("/")  # inputs are also looked for beside the manifest
    rebuild(manifest_path(out))
    write(path, path.read_bytes() + b"100\n")
    with pytest.raises(ValueError, match=r"in\.jsonl is not the file that .*out\.jsonl\.manifest\.json was made from"):
        rebuild(manifest_path(out))
    assert out.read_bytes() == expected
    path.unlink()
    with pytest.raises(ValueError, match=r"in\.jsonl, an input of .*, does not exist"):
        rebuild(manifest_path(out))


def test_rebuilding_notices_an_edited_manifest(tmp_path):
    path, out = write(tmp_path / "in.jsonl", "".join(f"{n}\n" for n in range(100))), tmp_path / "out.jsonl"
    made = sample(path, out, max_mb=None, seed=9)
    expected = out.read_bytes()
    for key, value in (("seed", 8), ("max_rows", 5)):
        manifest_path(out).write_text(json.dumps({**made, key: value}))
        with pytest.raises(ValueError, match="the rebuilt sample differs from its manifest"):
            rebuild(manifest_path(out))
        assert out.read_bytes() == expected
    wrong = {**made, "sources": [{"name": "a", "files": 2, "max_mb": 1, "weight": None}]}  # of one input
    for content in ("{", "[]", "{}", '{"inputs": [], "max_mb": 1, "seed": 1}', json.dumps(wrong)):
        with pytest.raises(ValueError, match="is not the manifest of a sample"):
            rebuild(write(tmp_path / "wrong.json", content))


# ---- the command line


def test_command_prints_the_figures_and_returns_0(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", ("x" * 1023 + "\n") * 2000)
    assert main([str(path), str(tmp_path / "out.jsonl"), "--max_mb", "1", "--seed", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for figure in ("1,025 of 2,000 lines (0 blank), seed 3", "target size  1 MB", "actual size  1.00 MB", "out.jsonl"):
        assert figure in printed.out
    assert main(["--manifest", str(manifest_path(tmp_path / "out.jsonl"))]) == 0
    assert "as in the manifest" in capsys.readouterr().out
    manifest = json.loads(manifest_path(tmp_path / "out.jsonl").read_text())
    del manifest["output"]  # as in a run's sample.json
    (tmp_path / "sample.json").write_text(json.dumps(manifest))
    assert main(["--manifest", str(tmp_path / "sample.json"), str(tmp_path / "again.jsonl")]) == 0
    assert "as in the manifest" not in (said := capsys.readouterr().out) and "sha256" in said


def test_defaults_are_the_originals_and_null_lifts_the_cap(tmp_path):
    path = write(tmp_path / "in.jsonl", "a\nb\n")
    assert main([str(path), str(tmp_path / "out.jsonl")]) == 0
    made = json.loads(manifest_path(tmp_path / "out.jsonl").read_text())
    assert (made["max_mb"], made["seed"]) == (72, 42)
    assert main(["--max_mb", "null", str(path), "--seed", "1", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads(manifest_path(tmp_path / "out.jsonl").read_text())["max_mb"] is None


def test_empty_sample_is_written_as_the_original_does_with_a_warning(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", "a\nb\n")
    assert main([str(path), str(tmp_path / "out.jsonl"), "--max_mb", "0"]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert "warning: nothing is selected" in capsys.readouterr().err


def test_progress_is_shown_on_a_terminal_only_and_wiped(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "in.jsonl", "a\nb\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([str(path), str(tmp_path / "out.jsonl")]) == 0
    printed = capsys.readouterr().err
    assert "100 %" in printed
    assert printed.endswith("\r\033[K")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent.jsonl", "out.jsonl"], "absent.jsonl does not exist"),
        (["in.jsonl"], "at least one input and, last, the file to write"),
        (["in.jsonl", "in.jsonl"], "is one of the inputs"),
        (["in.jsonl", "out.jsonl", "--max_mb", "-3"], "max_mb is -3.0"),
        (["--manifest", "in.jsonl"], "is not the manifest of a sample"),
        (["--manifest", "in.jsonl", "a", "b"], "takes at most one path"),
    ],
)
def test_wrong_use_is_one_line_on_stderr(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", "a\n")
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["in.jsonl", "out.jsonl", "--max_m", "3"], "did you mean --max_mb?"),
        (["in.jsonl", "out.jsonl", "--max-mb=3"], "did you mean --max_mb?"),
        (["in.jsonl", "out.jsonl", "--max_mb", "many"], "invalid number of MB value: 'many'"),
        (["in.jsonl", "out.jsonl", "--seed", "1.5"], "invalid int value: '1.5'"),
    ],
)
def test_wrong_options_are_refused_with_the_nearest(capsys, argv, message):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


# ---- size


# Not `resource.getrusage`: a child's starts at the peak of the process that forked it.
PEAK = """
import sys
from minimind_sft.sampling import main
assert main(sys.argv[1:]) == 0
assert not {"torch", "lightning", "jinja2", "tokenizers", "transformers"} & set(sys.modules)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["plain", "gzip", "array"])
def test_peak_memory_does_not_follow_the_file_and_torch_is_not_imported(tmp_path, kind):
    line = ('{"conversations": "' + "你好, world " * 50 + '"}\n').encode()
    count, path = 160_000, tmp_path / ("in.json" if kind == "array" else "in.jsonl")
    with gzip.open(path, "wb", compresslevel=1) if kind == "gzip" else path.open("wb") as file:
        for part in range(100):
            block = line * (count // 100)
            file.write(b"[,"[part > 0 :][:1] + block.replace(b"\n", b",")[:-1] if kind == "array" else block)
        file.write(b"]" * (kind == "array"))
    assert len(line) * count > 110e6
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "out.jsonl"), "--max_mb", "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert f"of {count:,} lines" in done.stdout
    # the sample of 4 MB is kept where seeking is impossible, and an array is converted in pieces of 1 MB
    allowed = 64 + 24 * count / MEBIBYTE + {"plain": 0, "gzip": 4, "array": 20}[kind]
    assert int(done.stdout.split()[-1]) / 1024 < allowed


def test_table_and_order_take_sixteen_bytes_a_line(tmp_path):
    path = write(tmp_path / "in.jsonl", "ab\n" * 100_000)
    chosen = select([path], max_mb=None, seed=0)
    table = chosen._table
    assert table.starts.nbytes + table.lengths.nbytes + chosen._picked.nbytes == 16 * 100_000 + 8
    assert table.starts.dtype == np.int64
