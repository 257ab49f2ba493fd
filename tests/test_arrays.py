"""JSON arrays: each element is a line, wherever a line is; and what is no array says so."""

import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_sft import arrays, sources
from minimind_sft.arrays import array_blocks
from minimind_sft.files import Files
from minimind_sft.probes import load_probes
from minimind_sft.sampling import Line, expand, main, read_lines, rebuild, sample, select
from minimind_sft.stores import Stores
from minimind_sft.strict_json import Rejected, load

PROJECT = Path(__file__).resolve().parents[1]
CHAT = '{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "%s"}]}'


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def converted(content: bytes | str, size: int = 1 << 16) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return b"".join(array_blocks(Path("in.json"), io.BytesIO(content), size))


# ---- its bytes


SIZES = (1, 2, 3, 5, 8, 1000)


@pytest.mark.parametrize("size", SIZES)
def test_elements_become_lines_of_the_same_bytes(size):
    content = '\ufeff \n[{"a": ",]}[{", "b": [1, {"c": "\\"],\\\\"}]},{},\t"x\\\\", [ ],-1.5e3,null,"\\\\\\"]"] \r\n\t'
    assert converted(content, size).decode() == (
        '{"a": ",]}[{", "b": [1, {"c": "\\"],\\\\"}]}\n{}\n\t"x\\\\"\n [ ]\n-1.5e3\nnull\n"\\\\\\"]"'
    )


@pytest.mark.parametrize("size", SIZES)
def test_element_of_several_lines_becomes_one_and_white_space_shrinks_outside_strings_only(size):
    content = '[\n    {\r\n\t"a":  "  two  spaces  ",\n        "b": [\n 1\r2 ]\n    }\n]'
    assert converted(content, size).decode() == ' { "a": "  two  spaces  ", "b": [ 1 2 ] } '


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.text('\\"[]{},:\n\r\u2028 ', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(VALUES, max_size=8), indent=st.sampled_from([None, 0, 3, "\t"]), ascii=st.booleans(),
       white=st.text(" \n\r\t", max_size=4), size=st.integers(1, 40))  # fmt: skip
def test_any_array_in_any_dress_read_in_any_pieces_has_the_elements_that_json_finds(rows, indent, ascii, white, size):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    content = f"{white}{text}{white}".replace("\n", white + "\n").encode("utf-8", "replace")
    lines = converted(content, size).decode()
    assert [json.loads(line) for line in lines.split("\n") if line.strip()] == json.loads(content)
    assert "\r" not in lines
    if indent is None and not white:
        elements = [json.dumps(row, ensure_ascii=ascii).encode("utf-8", "replace").decode() for row in rows]
        assert [line.strip(" ") for line in lines.split("\n") if line] == elements


@settings(max_examples=100, deadline=None)
@given(content=st.text('[]{},:" \n\r\\a1', max_size=30), size=st.integers(1, 12))
def test_anything_after_a_bracket_is_lines_or_an_error_and_the_same_in_any_pieces(content, size):
    def outcome(size: int) -> str:
        try:
            return converted("[" + content, size).decode()
        except ValueError as error:
            return str(error).split(": b'")[0]  # what follows is shown as far as it is read

    assert outcome(size) == outcome(1000)


# ---- what is broken


def test_broken_element_is_a_row_with_a_reason_and_those_around_it_are_found(tmp_path):
    rows = ['{"a": 1}}', '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": "x\ny"}', '{"a" 1}', '{"a": 1\n2}', '"\\ud800"', "no"]
    path = write(tmp_path / "in.json", "[" + ",".join(f"{row}, {{}}" for row in rows) + "]")
    reasons = []
    for line in read_lines([path]):
        try:
            assert load(line.text) == {} and line.number % 2 == 0
        except Rejected as why:
            reasons.append((line.number, why.reason))
    expected = ["not_json", "duplicate_key", "not_a_number", "not_json", "not_json", "not_json", "lone_surrogate"]
    assert reasons == list(zip(range(1, 16, 2), [*expected, "not_json"], strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, {"b": 2}', "not closed; element 2, which begins at byte 10, is the last"),
        ('[{"a": 1}, {"b": 2, {"c": 3}]', "not closed; element 2, which begins at byte 10, is the last"),
        ('[1, "b, 2]', "not closed; element 2, which begins at byte 3, is the last"),
        ("[", "not closed; element 1, which begins at byte 1, is the last"),
        ('[1, "\\', "not closed; element 2, which begins at byte 3"),
        ('  [{"a": 1}], {"b": 2}]', "ends at byte 12, after 1 elements, but at byte 12 more follows: b'"),
        ("[1] \n  [2]", "ends at byte 3, after 1 elements, but at byte 7 more follows: b'"),
    ],
)
def test_array_that_is_not_closed_or_goes_on_is_an_error_that_says_where(size, content, message):
    with pytest.raises(ValueError, match=rf"^in\.json: the array .*{message}"):
        converted(content, size)


def test_invalid_utf8_is_named_by_element(tmp_path):
    path = write(tmp_path / "in.json", b'[{"a":\n1}, "\xff"]')
    with pytest.raises(ValueError, match=r"in\.json, element 2: byte 0xff is not valid UTF-8"):
        select([path], max_mb=None, seed=0)


OBJECTS = ['{"data": [{}, {}]}', '{"a": 1}\n\n', '{\n "a": [\n  {}\n ]\n}\n', '\ufeff{"a":\r[1]}', '{"a": 1,\n"b": 2}']


@pytest.mark.parametrize(("content", "head"), [*((content, 1 << 16) for content in OBJECTS), (OBJECTS[0], 5)])
def test_single_object_is_an_error_with_the_remedy_and_left_out_of_a_folder(tmp_path, monkeypatch, content, head):
    monkeypatch.setattr(arrays, "HEAD", head)
    path = write(tmp_path / "in.json", content)
    with pytest.raises(ValueError, match=r"in\.json is one JSON object, not an array of rows.*jq"):
        list(read_lines([path]))
    with pytest.raises(ValueError, match=r"in\.json is one JSON object"):
        select([path], max_mb=None, seed=0)
    rows = [write(tmp_path / "a.json", "[1]"), write(tmp_path / "b.jsonl", "{}"), write(tmp_path / "c.json", "{}\n{}")]
    assert expand(tmp_path) == rows


@pytest.mark.parametrize("head", [5, 1 << 16])
@pytest.mark.parametrize("content", ['{"a": "cut off\n{"b": 1}', '{"a": 1}\n{"b": 2}', '{"a": 1}}\r{', "x\n["])
def test_json_lines_in_a_json_file_are_lines(tmp_path, monkeypatch, content, head):
    monkeypatch.setattr(arrays, "HEAD", head)
    path = write(tmp_path / "in.json", content)
    assert [line.text for line in read_lines([path])] == content.splitlines()


def test_only_a_json_file_may_be_an_array(tmp_path):
    assert [line.text for line in read_lines([write(tmp_path / "in.jsonl", "[1]\n[2]")])] == ["[1]", "[2]"]
    for odd in ("[]", '["a"]', '[{"a": 1}]\n[{"a": 2}]'):
        assert [line.text for line in read_lines([write(tmp_path / "in.jsonl", odd)])] == odd.split("\n")


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}]', '[{"a": 1},\n{"a": 2}]\n', '[\n  {"a": 1}\n]'])
def test_an_array_that_is_named_as_lines_is_told_to_be_renamed(tmp_path, name, content):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name} is one JSON array, .* give it a name in .json"):
        list(read_lines([path]))


# ---- wherever a line is


@pytest.fixture(params=["", ".gz", ".zst"])
def packed(request, tmp_path):
    """An array of 300 chats, and the same as lines."""
    rows = [CHAT % f"number {number} 你好" for number in range(300)]
    lines = write(tmp_path / "in.jsonl", "\n".join(rows))
    content = ("[\n  " + ",\n  ".join(rows) + "\n]\n").encode()
    if request.param == ".gz":
        content = gzip.compress(content)
    elif request.param == ".zst":
        content = pytest.importorskip("zstandard", reason="the extra zst is not installed").compress(content)
    return write(tmp_path / f"in.json{request.param}", content), lines


@pytest.mark.parametrize("chunk", [331, 1 << 20])
def test_sample_of_an_array_is_that_of_its_elements_as_lines(packed, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    array, lines = packed
    for max_mb in (0.01, None):
        apart, together = select([array], max_mb=max_mb, seed=3), select([lines], max_mb=max_mb, seed=3)
        assert [line[1:] for line in apart] == [line[1:] for line in together]
        assert (apart.lines_seen, apart.blank) == (300, 0)
    both = list(select([lines, array], max_mb=None, seed=3))
    assert len(both) == 600 and Line(str(array), 7, CHAT % "number 6 你好") in both


def test_sample_verb_writes_lines_of_an_array_and_rebuilds_them(packed, tmp_path, capsys):
    array, lines = packed
    assert main([str(array), str(tmp_path / "a.jsonl"), "--max_mb", "0.01"]) == 0
    assert main([str(lines), str(tmp_path / "b.jsonl"), "--max_mb", "0.01"]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rebuild(tmp_path / "a.jsonl.manifest.json", tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_size_is_that_of_the_elements(tmp_path):
    path = write(tmp_path / "in.json", '[\n    {\n        "a": 1\n    },\n    [2]\n]')
    made = sample(path, tmp_path / "out.jsonl", max_mb=None, seed=0)
    assert sorted((tmp_path / "out.jsonl").read_text().splitlines()) == ["[2]", '{ "a": 1 }']
    assert made["bytes"] == 13
    assert Files(tmp_path / "cache").facts([path])[0].text_bytes == len(' { "a": 1 }\n [2] ')


def test_stores_take_arrays_for_chats_text_and_validation_and_name_the_element(packed, tmp_path):
    array, _ = packed
    broken = write(tmp_path / "broken.json", f'[{CHAT % "a"}, {{"a": 1}}, {CHAT % "b"}]')
    text = write(tmp_path / "text.json", json.dumps([{"text": f"Document {number}."} for number in range(9)], indent=1))
    stores = Stores(train_path=str(broken), val_path=str(array), pretrain_path=str(text), max_bad_ratio=1.0,
                    tokenizer=str(PROJECT / "data" / "tokenizer"), cache_dir=str(tmp_path / "cache"))  # fmt: skip
    dealt = stores.documents(stores.open(train=True))
    assert (len(dealt.train), len(dealt.validation), len(dealt.measured)) == (2, 300, 9)
    assert [(row["file"], row["line"], row["reason"]) for row in dealt.rejections()] == [
        (str(broken), 2, "unknown_format")
    ]


def test_probes_may_be_an_array(tmp_path):
    probe = {"prompt": "1 + 1 =", "question": "1 + 1?", "answer": "2"}
    another = probe | {"answer": "two"}
    assert load_probes([write(tmp_path / "in.json", json.dumps([probe, another]))])[1].answer == "two"
    with pytest.raises(ValueError, match=r"in\.json:2: not a probe"):
        load_probes([write(tmp_path / "in.json", json.dumps([probe, {}]))])

