"""Every format becomes one shape; what cannot be used is refused by name."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_sft.formats import FORMATS, Conversation, PlainText, Rejected, parse

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"name": "add", "arguments": {"a": 1}}


def shape(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


@pytest.mark.parametrize("row", [
    {"conversations": [HI, HELLO]},
    {"messages": [HI, HELLO]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, HELLO]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"instruction": "", "input": "Hi", "output": "Hello"},
    {"prompt": "Hi", "completion": "Hello"},
    {"prompt": "Hi", "response": "Hello"},
    {"prompt": [HI], "completion": [HELLO]},
])
def test_every_chat_format_becomes_the_same_messages(row):
    conversation = parse(f"  {json.dumps(row)}\r\n")
    assert conversation == Conversation([HI | {"train": True}, HELLO | {"train": True}], None)


@pytest.mark.parametrize("row", [
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"},
    {"instruction": "Hi", "output": "Hello", "system": "S"},
    {"prompt": "Hi", "completion": "Hello", "system": "S"},
    {"messages": [{"role": "developer", "content": "S"}, HI, HELLO]},
])
def test_a_system_prompt_comes_first_whatever_the_format_calls_it(row):
    assert shape(parse(json.dumps(row))) == [("system", "S"), ("user", "Hi"), ("assistant", "Hello")]


def test_alpaca_history_and_input_become_turns():
    row = {"instruction": "Sum up", "input": "a b c", "output": "abc", "history": [["q", "a"], ["r", "b"]]}
    assert shape(parse(json.dumps(row))) == [
        ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "Sum up\na b c"),
        ("assistant", "abc")]


def test_minimind_keeps_tools_and_calls_as_json_strings_and_both_are_parsed():
    row = {"conversations": [
        {"role": "system", "content": "S", "tools": json.dumps([{"name": "add"}])}, HI,
        {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": json.dumps([CALL])},
        {"role": "tool", "content": "2"}, HELLO]}
    conversation = parse(json.dumps(row))
    assert conversation.tools == [{"name": "add"}]
    assert conversation.messages[0] == {"role": "system", "content": "S", "train": True}
    assert conversation.messages[2] == {
        "role": "assistant", "content": "", "train": True, "reasoning_content": "so", "tool_calls": [CALL]}


@pytest.mark.parametrize("row", [
    {"conversations": None, "instruction": "hi", "output": "hello"},
    {"messages": None, "conversations": [HI, HELLO]},
    {"prompt": "hi", "completion": "hello", "messages": None, "text": None},
])
def test_a_key_that_holds_nothing_tells_no_format(row):
    conversation = parse(json.dumps(row))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_a_train_that_holds_nothing_leaves_it_to_the_weight():
    row = {"messages": [HI, HELLO | {"train": None, "weight": 0}, HI, HELLO | {"train": True, "weight": 0}]}
    assert [message["train"] for message in parse(json.dumps(row)).messages] == [True, False, True, True]


def test_openai_calls_are_objects_and_weight_says_what_to_learn_from():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
                        {"role": "tool", "content": "2", "tool_call_id": "1"}, HELLO | {"weight": 1}],
           "tools": [{"type": "function", "function": {"name": "add"}}]}
    conversation = parse(json.dumps(row))
    assert [message["train"] for message in conversation.messages] == [True, False, True, True]
    assert conversation.messages[1]["tool_calls"] == [call]
    assert conversation.tools == row["tools"]


def test_sharegpt_function_calls_become_tool_calls():
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(CALL)},
                             {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Hello"}],
           "tools": '[{"name": "add"}]'}
    conversation = parse(json.dumps(row))
    assert conversation.messages[1] == {"role": "assistant", "content": "", "train": True, "tool_calls": [CALL]}
    assert conversation.messages[2]["role"] == "tool" and conversation.tools == [{"name": "add"}]


def test_a_system_prompt_beside_the_messages_comes_first_and_a_function_call_is_a_tool_call():
    for key in ("messages", "conversations"):
        found = parse(json.dumps({"system": "Be brief.", key: [HI, HELLO]}))
        assert [message["content"] for message in found.messages] == ["Be brief.", HI["content"], HELLO["content"]]
    call = {"name": "add", "arguments": '{"a": 1}'}
    found = parse(json.dumps({"messages": [HI, {"role": "assistant", "content": None, "function_call": call}]}))
    assert found.messages[1]["tool_calls"] == [call]


def test_plain_text_keeps_where_it_comes_from():
    assert parse('{"text": " a\\n", "source": "wiki", "parent": "p1", "n": 1}') == PlainText(" a\n", "wiki", "p1")
    line = '{"text": "a", "source": 3, "parent": {"b": 1, "a": "é"}}'
    assert parse(line) == PlainText("a", "3", '{"a": "é", "b": 1}')
    assert parse('{"text": "a", "source": null}') == PlainText("a", None, None)


def test_content_is_kept_to_the_character():
    for content in ["", "  \n\t", "\x00", "\ufdd0\ufeff", "\U0001f642", "<|im_end|>\r\n"]:
        assert parse(json.dumps({"messages": [HI | {"content": content}, HELLO]})).messages[0]["content"] == content


def test_nesting_that_is_deep_but_not_absurd_is_taken():
    deep = "[" * 99 + "]" * 99
    assert parse('{"text": "a", "x": ' + deep + "}") == PlainText("a")
    assert parse('{"text": "a", "x": [' + "[]," * 500 + "[]]}") == PlainText("a")


def test_a_format_that_is_named_is_not_guessed():
    row = {"text": "t", "prompt": "Hi", "completion": "Hello"}
    assert isinstance(parse(json.dumps(row)), Conversation)
    assert parse(json.dumps(row), format="text") == PlainText("t")
    with pytest.raises(ValueError, match="format 'jsonl' is not known; choose one of auto, minimind"):
        parse("{}", format="jsonl")


def test_a_key_that_means_absent_means_absent():
    conversation = parse(json.dumps({"messages": [HI, HELLO | {"tool_calls": None, "reasoning_content": None}],
                                     "tools": []}))
    assert conversation == Conversation([HI | {"train": True}, HELLO | {"train": True}], None)
    empty = parse(json.dumps({"messages": [HI, HELLO | {"tool_calls": [], "reasoning_content": ""}], "tools": ""}))
    assert empty.messages[1] == HELLO | {"train": True, "reasoning_content": ""} and empty.tools is None


def chat(*messages: object, **more: object) -> str:
    return json.dumps({"messages": list(messages), **more})


@pytest.mark.parametrize(("line", "reason", "detail"), [
    ("", "empty", "the line is blank"),
    (" \t\u3000", "empty", "the line is blank"),
    ("{", "not_json", "the line begins '{'"),
    ('{"text": "a"} x', "not_json", "Extra data"),
    ('{"text": "a\x01"}', "not_json", "Invalid control character"),
    ('{"text": "\\ud83d"}', "lone_surrogate", "half a character, '\\ud83d'"),
    ('{"\\udc00": "a", "text": "b"}', "lone_surrogate", "half a character"),
    ('{"text": "\ud83d"}', "lone_surrogate", "re-encode the file"),
    ('{"text": "a", "text": "b"}', "duplicate_key", "key 'text' stands twice"),
    ('{"text": "a", "x": NaN}', "not_a_number", "NaN is not JSON"),
    ('{"text": "a", "x": [-Infinity]}', "not_a_number", "-Infinity is not JSON"),
    ("[" * 100_000, "too_deep", "nested over 100 levels"),
    ('{"text": "a", "x": ' + "[" * 100 + "]" * 100 + "}", "too_deep", "nested over 100 levels"),
    ('{"text": "a", "x": ' + "9" * 5000 + "}", "not_json", "Exceeds the limit"),
    ("[1]", "not_an_object", "a list, [1]"),
    ('"text"', "not_an_object", 'a string, "text"'),
    ("null", "not_an_object", "the line is missing or null"),
    ("{}", "unknown_format", "keys are none; expected conversations, messages"),
    ('{"question": "q", "answer": "a"}', "unknown_format", "keys are answer, question"),
    ('{"text": null}', "content_not_a_string", "text is missing or null"),
    ('{"text": " \\n"}', "empty", "text is blank"),
    ('{"messages": {"role": "user"}}', "not_a_list", 'messages is an object, {"role": "user"}'),
    ('{"conversations": null}', "not_a_list", "conversations is missing"),
    ('{"messages": []}', "empty", "messages holds no message"),
    (chat(HI), "no_assistant_turn", "1 messages and none is the assistant's"),
    (chat("Hi", HELLO), "not_an_object", 'message 1 is a string, "Hi"'),
    (chat(HI | {"content": 42}, HELLO), "content_not_a_string", "message 1 (user): content is a number, 42"),
    (chat(HI, HELLO | {"content": None}), "content_not_a_string", "message 2 (assistant): content is missing"),
    (chat(HI | {"content": {"a": 1}}, HELLO), "content_not_a_string", 'an object, {"a": 1}'),
    (chat(HI | {"content": [{"type": "image_url"}]}, HELLO), "content_not_text", "a part that is not text"),
    (chat(HI | {"content": [{"type": "text", "text": 1}]}, HELLO), "content_not_text", "a number, 1"),
    (chat(HI, HELLO | {"reasoning_content": 1}), "content_not_a_string", "reasoning_content is a number, 1"),
    (chat(HI | {"role": "narrator"}, HELLO), "bad_role", 'message 1: role is a string, "narrator"; use one of system'),
    (chat(HI | {"role": ["user"]}, HELLO), "bad_role", "a list"),
    (chat({"content": "Hi"}, HELLO), "bad_role", "role is missing"),
    (chat(HI, HELLO | {"train": "no"}), "bad_train", "message 2: train or weight is a string"),
    (chat(HI, HELLO | {"weight": 0.5}), "bad_train", "a number, 0.5"),
    (chat(HI, HELLO | {"tool_calls": "[{"}), "bad_tool_calls", "message 2: tool_calls is a string that is not JSON"),
    (chat(HI, HELLO | {"tool_calls": [1]}), "bad_tool_calls", "must be a list of objects"),
    (chat(HI, HELLO | {"tool_calls": [{"arguments": {}}]}), "bad_tool_calls", "a call without a name"),
    (chat(HI, HELLO | {"tool_calls": [{"function": "f"}]}), "bad_tool_calls", "a call without a name"),
    (chat(HI, HELLO | {"tool_calls": [{"name": "f"}]}), "bad_tool_calls", "arguments of 'f' must be an object"),
    (chat(HI, HELLO, tools="[1]"), "bad_tools", "tools must be a list of objects"),
    (chat(HI, HELLO, tools="nonsense"), "bad_tools", "a string that is not JSON (not_json)"),
    (chat(HI, HELLO, tools='[{"a": 1, "a": 2}]'), "bad_tools", "(duplicate_key)"),
    ('{"instruction": "a", "output": "b", "input": 3}', "content_not_a_string", "input is a number, 3"),
    ('{"instruction": "a", "output": null}', "content_not_a_string", "message 2 (assistant): content is missing"),
    ('{"instruction": "a", "output": "b", "history": [["q"]]}', "bad_history", "[question, answer] pairs"),
    ('{"conversations": [{"from": "human", "value": "a"}, 3]}', "not_an_object", "message 2 is a number, 3"),
    ('{"conversations": [{"from": "cat", "value": "a"}]}', "bad_role", 'role is a string, "cat"'),
])
def test_what_cannot_be_used_is_refused_by_name_with_its_value(line, reason, detail):
    with pytest.raises(Rejected) as caught:
        parse(line)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
    assert str(caught.value) == f"{reason}: {caught.value.detail}"
    caught.value.detail.encode()  # it can be printed and written to a file
    assert len(caught.value.detail) < 300


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tools", "tool_calls", "function", "name", "arguments",
                         "train", "weight", "reasoning_content", "type", "text"]), inner, max_size=4),
    max_leaves=12)
rows = st.dictionaries(st.sampled_from([
    "conversations", "messages", "instruction", "input", "output", "history", "system", "prompt", "completion",
    "response", "text", "source", "tools"]), values, max_size=5)


def settle(line: str, format: str) -> None:
    """A line ends in exactly one of: something usable, or a refusal."""
    try:
        parsed = parse(line, format=format)
    except Rejected as why:
        assert why.reason and why.detail
        why.detail.encode()
        return
    if isinstance(parsed, PlainText):
        assert parsed.text
        return
    assert any(message["role"] == "assistant" for message in parsed.messages)
    for message in parsed.messages:
        assert isinstance(message["content"], str) and isinstance(message["train"], bool)


@settings(max_examples=500, deadline=None)
@given(row=rows, format=st.sampled_from(["auto", *FORMATS]))
def test_any_object_is_used_or_refused(row, format):
    settle(json.dumps(row), format)


@settings(max_examples=300, deadline=None)
@given(line=st.text() | st.text(st.characters(categories=["Cs"])), format=st.sampled_from(["auto", *FORMATS]))
def test_any_text_is_used_or_refused(line, format):
    settle(line, format)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_real_line_with_bytes_changed_is_used_or_refused(data):
    line = chat({"role": "system", "content": "S", "tools": json.dumps([{"name": "f"}])}, HI,
                {"role": "assistant", "content": "é\U0001f642", "tool_calls": [CALL]}, HELLO).encode()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(line) - 1))
        line = line[:at] + data.draw(st.binary(max_size=3)) + line[at + data.draw(st.integers(0, 3)) :]
    settle(line.decode("utf-8", "replace"), "auto")


def test_every_real_line_is_used(shared):
    for name, kind in (("sft_val", Conversation), ("pretrain_heldout", PlainText)):
        with gzip.open(shared / "data" / f"{name}.jsonl.gz", "rt") as file:
            assert all(isinstance(parse(line), kind) for line in file)
