"""A text that goes on from its cache gives the tokens of reading it anew."""

import pytest
import torch
from test_generate import random_model, uncached_greedy

from minimind_sft import continuation as module
from minimind_sft.continuation import Continuation
from minimind_sft.generate import Sampling, generate

GREEDY = Sampling(0.0, None, None, 0)
# each prompt is all of the chat so far: longer, the same, another branch, shorter, something else
PROMPTS = [
    [1, 2, 3, 4, 5, 6, 7],
    [1, 2, 3, 4, 5, 6, 7, 30, 31, 9],
    [1, 2, 3, 4, 5, 6, 7, 30, 31, 9],
    [1, 2, 3, 4, 40, 41, 42, 43],
    [1, 2],
    [8],
]


def answer(text: Continuation, prompt: list[int], count: int = 12, **more: object) -> list[int]:
    return list(text.stream(prompt, max_new_tokens=count, **({"sampling": GREEDY} | more)))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["minimind3", "minimind2"])
@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize(("read", "slots"), [(512, 128), (3, 2)])
def test_every_turn_gives_the_tokens_of_uncached_decoding(
    monkeypatch: pytest.MonkeyPatch, family: str, experts: int, read: int, slots: int
) -> None:
    monkeypatch.setattr(module, "READ", read)
    monkeypatch.setattr(module, "SLOTS", slots)
    model = random_model(family, experts)
    text = Continuation(model)
    wanted = [uncached_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in wanted}) > 3
    assert [answer(text, prompt) for prompt in PROMPTS] == wanted


def test_what_is_in_the_cache_is_not_read_again() -> None:
    text = Continuation(random_model())
    first = answer(text, PROMPTS[0], 4)
    assert text.read == 7 + 3 and text.ids == PROMPTS[0] + first[:3]  # the last token written was never fed
    answer(text, PROMPTS[0] + first + [9, 9], 1)
    assert text.read == 10 + 3
    answer(text, PROMPTS[0], 1)  # all of it is known, but the last token's output is not kept
    assert text.read == 13 + 1


def test_sampling_is_that_of_generate_and_each_turn_has_its_own_luck() -> None:
    model = random_model()
    settings = {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "seed": 7}
    wanted = generate(model, [PROMPTS[0], PROMPTS[0]], max_new_tokens=9, **settings)  # type: ignore[arg-type]
    sampling = Sampling(2.0, 20, 0.9, 7)
    text = Continuation(model)
    assert [answer(text, PROMPTS[0], 9, sampling=sampling, turn=turn) for turn in (0, 1)] == wanted
    assert wanted[0] != wanted[1]


def test_an_answer_ends_after_its_stop_token_or_when_nobody_reads_on() -> None:
    model = random_model()
    free = answer(Continuation(model), PROMPTS[0])
    assert answer(Continuation(model), PROMPTS[0], stop_ids={free[2]}) == free[: free.index(free[2]) + 1]
    assert answer(Continuation(model), PROMPTS[0], 0) == []
    text = Continuation(model)
    tokens = text.stream(PROMPTS[0], max_new_tokens=12, sampling=GREEDY)
    assert next(tokens) == free[0]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # while suspended
    tokens.close()
    assert answer(text, PROMPTS[1]) == uncached_greedy(model, PROMPTS[1], 12)
    with pytest.raises(ValueError, match="prompt is empty"):
        answer(text, [])
