"""The basis of the base's sensitivity, and AdamW in it."""

import copy
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from minimind_sft.batching import MicroBatch, pack
from minimind_sft.drawing import draw
from minimind_sft.fisher import Basis, RotatedAdamW, Scores, _onednn_keeps_fp32, bases_of, turning
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig

V, H = 40, 16
QUARTER = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # turns the plane by 90 degrees
DIAGONAL = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5  # by 45


def random_model(**settings: Any) -> Transformer:
    model = Transformer(ModelConfig.minimind3(vocab_size=V, hidden_size=H, num_hidden_layers=2, **settings))
    model.initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20.0 if parameter.ndim > 1 else 1.0)  # so that layers do something
    return model.requires_grad_(False)


def documents(count: int, length: int = 40) -> Iterator[MicroBatch]:
    draws = np.random.default_rng(3)
    for _ in range(count):
        yield pack([(draws.integers(0, V, length), np.ones(length, bool))])


def hidden_states(model: Transformer, document: MicroBatch) -> Tensor:
    flat = document.batch
    return model.hidden(flat.input_ids, flat.positions, flat.cu_seqlens, flat.max_length)


# ---- the basis


def test_a_matrix_is_turned_and_turned_back() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    basis = Basis(QUARTER, None)
    assert basis.turned(matrix).tolist() == [[3.0, 4.0], [-1.0, -2.0]]
    assert Basis(None, QUARTER).turned(matrix).tolist() == [[2.0, -1.0], [4.0, -3.0]]
    both = Basis(QUARTER, DIAGONAL)
    torch.testing.assert_close(both.back(both.turned(matrix)), matrix)


def test_in_the_basis_what_goes_into_the_output_layer_is_uncorrelated() -> None:
    base = random_model()
    before = copy.deepcopy(base.state_dict())
    bases = bases_of(Scores(base, documents(20), seed=0))
    states = torch.cat([hidden_states(base, document)[document.targets] for document in documents(20)])
    right = bases["model.embed_tokens.weight"].right
    assert right is not None and bases["model.embed_tokens.weight"].left is None  # V rows would be a basis of V x V
    turned = states @ right
    moments = turned.t() @ turned
    assert (moments - moments.diag().diag()).abs().max() < 1e-4 * moments.max()
    plain = states.t() @ states
    assert (plain - plain.diag().diag()).abs().max() > 0.05 * plain.max()  # which it is not as it stands
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_in_the_basis_the_gradients_at_an_output_are_uncorrelated() -> None:
    base = random_model()
    bases = bases_of(Scores(base, documents(20), seed=5))
    outputs: list[Tensor] = []
    base.get_submodule("model.layers.1.self_attn.o_proj").register_forward_hook(
        lambda _, __, output: outputs.append(output)
    )
    base.requires_grad_(True)
    scored = list(Scores(base, documents(20), seed=5))
    assert [drawn for _, drawn in scored] == [39] * 20
    seen = torch.autograd.grad([score for score, _ in scored], outputs)
    left = bases["model.layers.1.self_attn.o_proj.weight"].left
    assert left is not None
    turned = torch.cat(seen) @ left
    moments = turned.t() @ turned
    assert (moments - moments.diag().diag()).abs().max() < 1e-3 * moments.max()


def test_every_matrix_has_a_basis_but_no_side_wider_than_the_model() -> None:
    base = random_model(num_attention_heads=4, num_key_value_heads=2)
    bases = bases_of(Scores(base, documents(3), seed=0))
    assert set(bases) == {name for name, parameter in base.named_parameters() if parameter.ndim > 1}
    for name, basis in bases.items():
        for side, size in zip(basis, base.get_parameter(name).shape, strict=True):
            assert (side is None) == (size > H), name
            if side is not None:
                torch.testing.assert_close(side.t() @ side, torch.eye(size), atol=1e-5, rtol=0)


def test_layers_that_read_one_input_have_one_right_side_among_them_also_when_restored() -> None:
    base, inputs = random_model(num_experts=2), dict[str, Tensor]()
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0]}))
    found = bases_of(Scores(base, documents(3), seed=0))
    optimizer, restored = (RotatedAdamW(base.parameters(), lr=0.1) for _ in range(2))
    optimizer.turn({base.get_parameter(name): basis for name, basis in found.items()})
    written = io.BytesIO()
    torch.save(optimizer.state_dict(), written)
    written.seek(0)
    restored.load_state_dict(torch.load(written, weights_only=True))
    shared = 0
    for name in inputs:
        for other in inputs:
            if other.rpartition(".")[0] == name.rpartition(".")[0] and name < other:
                one, two = (base.get_parameter(f"{layer}.weight") for layer in (name, other))
                same = inputs[name] is inputs[other]  # as the model computes
                for bases in (optimizer.bases, restored.bases):
                    rights = [bases[weight].right for weight in (one, two)]
                    pointers = {right.data_ptr() for right in rights if right is not None}
                    assert (len(pointers) == 1) == (same or None in rights), (name, other)
                shared += same
    assert shared == 2 * (3 + 2)  # in two layers: three pairs of q, k and v, and gate and up of two experts


def test_a_basis_is_taken_from_64_tokens_a_channel_and_the_scores_go_on_behind_it() -> None:
    base, text = random_model(), list(documents(40))
    enough = -(-64 * H // 39)  # documents of 39 targets
    assert enough < len(text)
    of_all, of_enough, of_fewer = (bases_of(Scores(base, text[:count], seed=1)) for count in (None, enough, enough - 1))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(of_all[name].right, of_enough[name].right)  # type: ignore[arg-type]
    assert not torch.equal(of_all[name].right, of_fewer[name].right)  # type: ignore[arg-type]
    anew, continued = Scores(base, text, seed=1), Scores(base, text, seed=1)
    bases_of(continued)
    assert [float(score) for score, _ in continued] == [float(score) for score, _ in anew]


def test_tokens_are_drawn_as_often_as_the_base_expects_them() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(p.expand(20_000, -1), torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    assert drawn.shape == (20_000, 1)
    counts = drawn.flatten().bincount(minlength=6) / len(drawn)
    torch.testing.assert_close(counts, p, atol=0.015, rtol=0)
    assert counts[[0, 2, 5]].tolist() == [0.0, 0.0, 0.0]


def test_in_half_precision_the_basis_is_whole_all_the_same() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        basis = bases_of(Scores(random_model(), documents(3), seed=0))["model.layers.0.self_attn.q_proj.weight"]
    for side in basis:
        assert side is not None and side.dtype == torch.float32
        torch.testing.assert_close(side.t() @ side, torch.eye(len(side)), atol=1e-5, rtol=0)


def test_an_expert_that_no_token_is_sent_to_keeps_its_axes() -> None:
    bases = bases_of(Scores(random_model(num_experts=8), documents(1, length=3), seed=0))  # 3 tokens, one expert each
    rights = [basis.right for name, basis in bases.items() if "layers.0.mlp.experts" in name and "gate_proj" in name]
    assert sum(torch.equal(right, torch.eye(H)) for right in rights if right is not None) >= 5


# ---- the optimizer


def steps(optimizer: RotatedAdamW | AdamW, weight: Tensor, gradients: list[Tensor], decay: float = 0.1) -> Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["weight_decay"] = decay
        optimizer.step()
    return weight.detach().clone()


def some_gradients(count: int, *shape: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draws) for _ in range(count)]


def test_without_bases_it_is_adamw_bit_for_bit() -> None:
    start, gradients = torch.ones(3, 2), some_gradients(5, 3, 2)
    found = []
    for kind in (AdamW, RotatedAdamW):
        weight = torch.nn.Parameter(start.clone())
        found.append(steps(kind([weight], lr=0.1), weight, gradients))
    assert torch.equal(*found)


def test_a_step_in_a_basis_is_adamws_step_of_the_turned_matrix() -> None:
    basis, start, gradients = Basis(DIAGONAL, QUARTER), torch.tensor([[1.0, 2.0], [3.0, 5.0]]), some_gradients(7, 2, 2)
    here = torch.nn.Parameter(start.clone())
    rotated = RotatedAdamW([here], lr=0.1)
    rotated.turn({here: basis})
    there = torch.nn.Parameter(basis.turned(start))
    expected = steps(AdamW([there], lr=0.1), there, [basis.turned(gradient) for gradient in gradients])
    torch.testing.assert_close(steps(rotated, here, gradients), basis.back(expected))
    plain = torch.nn.Parameter(start.clone())
    assert (steps(AdamW([plain], lr=0.1), plain, gradients) - here).abs().max() > 0.05  # the axes do matter to Adam


def test_gradients_that_were_turned_already_are_not_turned_again() -> None:
    basis, gradients, found = Basis(DIAGONAL, QUARTER), some_gradients(4, 2, 2), []
    for ahead in (False, True):
        weight = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = RotatedAdamW([weight], lr=0.1)
        optimizer.turn({weight: basis})
        for number, gradient in enumerate(gradients):
            weight.grad = gradient.clone()
            if ahead:
                optimizer.turn_gradients()
                optimizer.turn_gradients()
                torch.testing.assert_close(weight.grad, basis.turned(gradient))
            if number == 1:  # thrown away, as the guard does; the next one comes in the axes again
                optimizer.zero_grad()
            else:
                optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def how() -> tuple[str, bool]:
    """What a product is taken in: the precision of fp32, and whether it is bf16 instead."""
    return torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "device, half, kept, expected",
    [
        ("cpu", False, True, ("medium", False)),  # by oneDNN, in fp32
        ("cpu", False, False, ("highest", False)),
        ("cpu", True, False, ("highest", True)),
        ("cuda", True, False, ("high", False)),
        ("cuda", False, False, ("highest", False)),
        ("mps", True, False, ("highest", False)),
    ],
)
def test_only_the_turning_is_faster_and_less_exact(
    monkeypatch: pytest.MonkeyPatch, device: str, half: bool, kept: bool, expected: tuple[str, bool]
) -> None:
    seen: list[tuple[str, bool]] = []

    def watched(method: Any) -> Any:
        def call(self: Basis, matrix: Tensor) -> Tensor:
            seen.append(how())
            result: Tensor = method(self, matrix)
            return result

        return call

    monkeypatch.setattr("minimind_sft.fisher._onednn_keeps_fp32", lambda: kept)
    monkeypatch.setattr(Basis, "turned", watched(Basis.turned))
    monkeypatch.setattr(Basis, "back", watched(Basis.back))
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = RotatedAdamW([weight], lr=0.1, turning=turning(torch.device(device), half=half))
    optimizer.turn({weight: Basis(DIAGONAL, None)})
    steps(optimizer, weight, some_gradients(1, 2, 2))
    assert seen == [expected, expected] and how() == ("highest", False)
    assert weight.dtype == torch.float32 and not torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    "machine, amx, expected", [("x86_64", False, True), ("x86_64", True, False), ("arm64", False, False)]
)
def test_fp32_is_left_to_onednn_only_where_it_stays_fp32(
    monkeypatch: pytest.MonkeyPatch, machine: str, amx: bool, expected: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    assert _onednn_keeps_fp32() == expected


def test_a_parameter_without_gradient_stays() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = RotatedAdamW([weight], lr=0.1)
    optimizer.turn({weight: Basis(DIAGONAL, None)})
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_the_bases_are_part_of_the_state() -> None:
    gradients, found = some_gradients(6, 2, 2), []
    for stop in (None, 3):
        weight = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = RotatedAdamW([weight], lr=0.1)
        optimizer.turn({weight: Basis(DIAGONAL, None)})
        steps(optimizer, weight, gradients[:stop])
        if stop:
            saved, weight = copy.deepcopy(optimizer.state_dict()), torch.nn.Parameter(weight.detach().clone())
            optimizer = RotatedAdamW([weight], lr=0.1)
            optimizer.load_state_dict(saved)
            steps(optimizer, weight, gradients[stop:])
        found.append(weight)
    assert torch.equal(*found)


def test_a_state_of_plain_adamw_is_taken() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    plain = AdamW([weight], lr=0.1)
    steps(plain, weight, some_gradients(2, 2, 2))
    optimizer = RotatedAdamW([weight], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state_dict()["bases"] == [None]
