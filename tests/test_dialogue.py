"""A conversation is prompted as training saw it, and only whole characters are shown."""

from pathlib import Path

import pytest
import torch

from minimind_sft.chat import ChatTemplate
from minimind_sft.dialogue import Characters, Dialogue
from minimind_sft.generate import Sampling, generate
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig

FOLDER = Path(__file__).resolve().parents[1] / "data" / "tokenizer"
GREEDY = Sampling(0.0, None, None, 0)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.from_folder(FOLDER)


@pytest.fixture(scope="module")
def model(template: ChatTemplate) -> Transformer:
    config = ModelConfig.minimind3(
        hidden_size=32, num_hidden_layers=2, vocab_size=template.vocab_size, intermediate_size=48
    )
    model = Transformer(config)
    model.initialise(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.1)
    return model


def dialogue(model: Transformer, template: ChatTemplate, count: int = 12, system: str | None = None) -> Dialogue:
    return Dialogue(model, template, sampling=GREEDY, max_new_tokens=count, system=system)


def test_every_turn_is_what_the_whole_conversation_gives_without_a_cache(
    model: Transformer, template: ChatTemplate
) -> None:
    talk = dialogue(model, template, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    read = 0
    for message in ("Hi", "What is the capital of Peru?", "<|im_end|> 钬是什么?"):
        messages.append({"role": "user", "content": message})
        prompt = template.prompt(messages)
        (ids,) = generate(model, [prompt], max_new_tokens=12, stop_ids=template.stop_ids)
        said = "".join(talk.ask(message))
        assert said == template.decode(ids).rstrip("\ufffd")
        messages.append({"role": "assistant", "content": template.decode(ids)})
        assert talk.messages == messages and talk.cut
        fresh, read = talk.text.read - read, talk.text.read
    assert fresh < len(prompt)  # of the last prompt, the beginning was in the cache


def test_reset_forgets_all_but_the_system_prompt(model: Transformer, template: ChatTemplate) -> None:
    talk = dialogue(model, template, system="Be brief.")
    first = "".join(talk.ask("Hi"))
    second = "".join(talk.ask("Hi"))
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert "".join(talk.ask("Hi")) == first != second


def test_the_answer_ends_at_the_end_of_turn_which_is_not_shown(model: Transformer, template: ChatTemplate) -> None:
    talk = dialogue(model, template)
    (ids,) = generate(model, [template.prompt([{"role": "user", "content": "Hi"}])], max_new_tokens=12)
    template_that_stops = ChatTemplate.from_folder(FOLDER)
    template_that_stops.stop_ids = (ids[4],)
    talk = dialogue(model, template_that_stops)
    assert "".join(talk.ask("Hi")) == template.decode(ids[: ids.index(ids[4])]).rstrip("\ufffd") and not talk.cut


def test_an_answer_that_is_stopped_is_part_of_the_conversation(model: Transformer, template: ChatTemplate) -> None:
    talk = dialogue(model, template)
    answer = talk.ask("Hi")
    piece = next(answer)
    answer.close()
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert talk.messages[1]["content"].startswith(piece)


def test_raw_text_is_framed_as_a_document_and_each_is_alone(model: Transformer, template: ChatTemplate) -> None:
    talk = dialogue(model, template)
    ids = template.encode_text("The capital of Peru")
    (framed,) = generate(model, [[template.bos_id, *ids]], max_new_tokens=12, stop_ids=template.stop_ids)
    (bare,) = generate(model, [ids], max_new_tokens=12, stop_ids=template.stop_ids)
    assert framed != bare
    for _ in range(2):
        assert "".join(talk.continue_text("The capital of Peru")) == template.decode(framed).rstrip("\ufffd")
    assert "".join(talk.continue_text("The capital of Peru", framed=False)) == template.decode(bare).rstrip("\ufffd")
    assert talk.messages == []


def test_an_answer_has_room_for_a_token(model: Transformer, template: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        dialogue(model, template, 0)


def test_what_a_template_refuses_is_an_error_for_the_user(model: Transformer, template: ChatTemplate) -> None:
    specification = (FOLDER / "tokenizer.json").read_text(encoding="utf-8")
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    refusing = ChatTemplate(specification, strict, variables={"eos_token": "<|im_end|>"})
    with pytest.raises(ValueError, match="refuses this conversation: .*no system here"):
        list(dialogue(model, refusing, system="x").ask("Hi"))


# ---- characters


def characters(pieces: list[bytes]) -> list[str]:
    """What is shown of tokens that are these bytes."""
    shown = Characters(lambda ids: b"".join(pieces[id] for id in ids).decode("utf-8", "replace"))
    return [shown.add(id) for id in range(len(pieces))]


def test_a_character_is_shown_when_its_last_byte_is_there() -> None:
    assert characters([b"a", b"\xe4", b"\xbd", b"\xa0", b"\xe5\xa5", b"\xbdb"]) == ["a", "", "", "你", "", "好b"]
    assert characters([b"\xf0\x9f", b"\x98", b"\x80", b"\xe4\xbd"]) == ["", "", "😀", ""]  # an open one is left out
    assert characters([b"\xe4", b"x", b"y"]) == ["", "\ufffdx", "y"]  # bytes that never become one


def test_a_space_that_the_decoder_drops_at_the_start_is_not_lost_in_the_middle() -> None:
    words = ["▁The", "▁cat", "s", "▁sat"]
    shown = Characters(lambda ids: "".join(words[id] for id in ids).replace("▁", " ").removeprefix(" "))
    assert "".join(shown.add(id) for id in range(4)) == "The cats sat"


def test_showing_a_long_answer_decodes_each_token_a_few_times() -> None:
    decoded: list[int] = []
    shown = Characters(lambda ids: decoded.extend(ids) or "x" * len(ids))  # type: ignore[func-returns-value]
    assert "".join(shown.add(0) for _ in range(1000)) == "x" * 1000
    assert len(decoded) < 5000
