"""Cached, batched decoding gives what uncached decoding of each prompt alone gives."""

import pytest
import torch

from minimind_sft import generate as module
from minimind_sft.generate import Sampling, generate
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [8, 8, 30], [40, 3, 17, 5]]


def random_model(family: str = "minimind3", num_experts: int = 0) -> Transformer:
    make = ModelConfig.minimind2 if family == "minimind2" else ModelConfig.minimind3
    model = Transformer(
        make(hidden_size=32, num_hidden_layers=2, vocab_size=50, intermediate_size=48, num_experts=num_experts)
    )
    model.initialise(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.1)
    return model


@torch.no_grad()
def uncached_greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        length = len(ids)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        ids.append(int(model(torch.tensor(ids), torch.arange(length), cu_seqlens, length)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["minimind3", "minimind2"])
@pytest.mark.parametrize("experts", [0, 4])
def test_cached_batched_greedy_equals_uncached_greedy_of_each_prompt_alone(family: str, experts: int) -> None:
    model = random_model(family, experts)
    wanted = [uncached_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in wanted}) > 1
    assert generate(model, PROMPTS, max_new_tokens=12) == wanted
    assert generate(model, PROMPTS, max_new_tokens=12, batch_size=3) == wanted


def test_caches_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOTS", 2)
    model = random_model()
    assert generate(model, PROMPTS, max_new_tokens=20) == [uncached_greedy(model, prompt, 20) for prompt in PROMPTS]


def test_a_row_ends_with_the_stop_token_and_the_others_go_on_unchanged() -> None:
    model = random_model()
    free = generate(model, PROMPTS, max_new_tokens=12)
    stop = free[0][2]
    wanted = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in free]
    assert [len(answer) for answer in wanted] != [12] * 4
    assert generate(model, PROMPTS, max_new_tokens=12, stop_ids={stop}) == wanted
    alone = [free[0], free[0], free[1], free[0]]  # three rows stop early, the third goes on by itself
    wanted = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in alone]
    assert len(wanted[2]) > len(wanted[0])
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert generate(model, prompts, max_new_tokens=12, stop_ids={stop}) == wanted
    everything_stops = generate(model, PROMPTS, max_new_tokens=12, stop_ids=range(50))
    assert everything_stops == [answer[:1] for answer in free]


def test_sampling_repeats_with_its_seed_and_ignores_company() -> None:
    model = random_model()
    first = generate(model, PROMPTS, max_new_tokens=12, temperature=2.0, seed=7)
    assert generate(model, PROMPTS, max_new_tokens=12, temperature=2.0, seed=7) == first
    assert generate(model, PROMPTS, max_new_tokens=12, temperature=2.0, seed=7, batch_size=1) == first
    assert generate(model, PROMPTS, max_new_tokens=12, temperature=2.0, seed=8) != first
    twins = generate(model, [PROMPTS[0], PROMPTS[0]], max_new_tokens=12, temperature=2.0, seed=7)
    assert twins[0] != twins[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_no_token_has_are_not_written(temperature: float) -> None:
    free, bound = (
        generate(random_model(), PROMPTS, max_new_tokens=12, temperature=temperature, vocab_size=size)
        for size in (None, 20)
    )
    assert max(map(max, free)) >= 20 > max(map(max, bound))


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrow_sampling_is_greedy(narrow: dict[str, float]) -> None:
    model = random_model()
    greedy = generate(model, PROMPTS, max_new_tokens=12)
    assert generate(model, PROMPTS, max_new_tokens=12, **({"temperature": 1.0} | narrow)) == greedy


@pytest.mark.parametrize(
    ("top_k", "top_p", "luck_to_token"),
    [
        (None, None, {0.0: 0, 0.19: 0, 0.21: 1, 0.69: 1, 0.71: 2, 0.999: 2}),
        (2, None, {0.0: 1, 0.62: 1, 0.63: 2, 0.999: 2}),  # 0.5 and 0.3 of 0.8
        (None, 0.4, {0.0: 1, 0.999: 1}),
        (None, 0.6, {0.62: 1, 0.63: 2, 0.999: 2}),
        (2, 0.4, {0.999: 1}),
    ],
)
def test_luck_picks_a_token_by_its_share(
    top_k: int | None, top_p: float | None, luck_to_token: dict[float, int]
) -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3, 0.0]]).log().expand(len(luck_to_token), -1)
    sampling = Sampling(1.0, top_k, top_p, seed=0)
    assert sampling.choose(logits, torch.tensor(list(luck_to_token))).tolist() == list(luck_to_token.values())


def test_the_model_is_left_as_it_was() -> None:
    model = random_model().train()
    recording: list[bool] = []
    hook = model.model.norm.register_forward_hook(lambda *_: recording.append(torch.is_inference_mode_enabled()))
    generate(model, PROMPTS, max_new_tokens=3)
    hook.remove()
    assert recording == [True] * 3 and model.training
    ids = torch.tensor([1, 2, 3])
    model(ids, torch.arange(3), torch.tensor([0, 3], dtype=torch.int32), 3).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_asked_is_nothing_written() -> None:
    assert generate(random_model(), [], max_new_tokens=5) == []
    assert generate(random_model(), PROMPTS, max_new_tokens=0) == [[], [], [], []]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": -2}, "top_k is -2"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(prompts: list[list[int]], settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(random_model(), prompts, max_new_tokens=2, **settings)
