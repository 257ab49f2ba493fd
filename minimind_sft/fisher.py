"""The basis in which the base's text is sensitive to a matrix, and AdamW in it.

Adam divides every entry of a gradient by its own size, so what it can tell apart depends on the axes. A direction that
the base's text depends on is, as a rule, no single weight but spread over a whole matrix: there, Adam moves all
directions at much the same rate, and replay has to pull those back that mattered. In the eigenbasis of the Fisher
information on that text, entries are such directions: those in which the text's gradient is large get a large second
moment and move little, the others are free for the chats.

The Fisher information of a matrix W (R, C) is taken as a Kronecker product, K-FAC's (Martens and Grosse 2015, arXiv
1503.05671): A = E[x x^T] of its inputs (C, C), and G = E[g g^T] of the gradients at its outputs (R, R), for tokens that
are drawn from the base itself. With their eigenvectors V and U, the gradient is turned to U^T grad V, AdamW's moments
are kept there (George et al. 2018, arXiv 1806.03884, do so for SGD; Vyas et al. 2024, arXiv 2409.11321, for Adam, in
the basis of the training gradients, renewed on the way), and the step is turned back. The basis is the base's, read
once before the first step: what is to be kept does not change in training.

A side wider than the model (feed-forward, vocabulary) is not turned: there a basis would outgrow the matrix, for a
thousandth of a nat. At 256 channels, the same recipe in the basis forgot half as much at a lower chat loss, for 3 % of
a step on a CPU (docs/forgetting.md).

Shapes: (R, C) of a matrix, N tokens, M of them targets.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from minimind_sft.batching import MicroBatch
from minimind_sft.drawing import draw
from minimind_sft.model import Transformer

Key = TypeVar("Key")
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # what these layers read is one tensor
Turning = Callable[[], AbstractContextManager[Any]]
TOKENS_PER_CHANNEL = 64  # of text, at most, that a basis is taken from; 3 to 6 times as many were no better


class Basis(NamedTuple):
    """Orthonormal columns; None leaves a side as it is."""

    left: Tensor | None  # (R, R)
    right: Tensor | None  # (C, C)

    def turned(self, matrix: Tensor) -> Tensor:
        """(R, C), in this basis."""
        matrix = matrix if self.left is None else self.left.t() @ matrix
        return matrix if self.right is None else matrix @ self.right

    def back(self, matrix: Tensor) -> Tensor:
        """(R, C), from this basis."""
        matrix = matrix if self.left is None else self.left @ matrix
        return matrix if self.right is None else matrix @ self.right.t()


class Scores:
    """For each batch of a text, the log-probability () of tokens that are drawn from the base at its targets, and their
    number.

    It is the Fisher information's expectation over the model's own answers, not over those that stand in the text. The
    scores of different positions are independent with mean 0, so the squared gradient of all of them is, in the mean,
    the sum of the tokens'. Every time through the text scores the same tokens, drawn the first time.

    Args:
        base: as it was loaded.
        text: in the base's own framing; a sequence, where it is gone through more than once.
        seed: of the drawn tokens.
    """

    def __init__(self, base: Transformer, text: Iterable[MicroBatch], seed: int) -> None:
        self.base, self._text = base, text
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[Tensor] = []  # (M, 1) of each batch

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for place, some in enumerate(self._text):
            flat = some.batch
            hidden = self.base.hidden(flat.input_ids, flat.positions, flat.cu_seqlens, flat.max_length)
            log_p = self.base.logits(hidden[some.targets]).float().log_softmax(-1)  # (M, V)
            if place == len(self._drawn):
                luck = torch.rand(len(log_p), generator=self._generator)  # on the CPU: the same on every device
                self._drawn.append(draw(log_p.detach().exp(), luck))
            yield log_p.gather(-1, self._drawn[place]).sum(), len(self._drawn[place])


def most_tokens(hidden_size: int) -> int:
    """Of text that a basis of a model of so many channels is taken from."""
    return TOKENS_PER_CHANNEL * hidden_size


def bases_of(scores: Scores) -> dict[str, Basis]:
    """The basis of every matrix that multiplies, by the name of its parameter.

    It is taken from the first `most_tokens`: a moment of H x H is known by so many. Layers that read the same input
    (`SAME_INPUT`) have one right side among them, a third of the bases' memory less.

    Args:
        scores: of the base, which is frozen and left as it was.
    """
    base = scores.base
    names: dict[Tensor, str] = {weight: name for name, weight in chain(base.named_parameters(), base.named_buffers())}
    layers = {names[layer.weight]: layer for layer in base.modules() if isinstance(layer, nn.Linear)}
    readers = {name: _first_reader(name) for name in layers}
    rights = {name: _zeros(layers[name].weight, layers[name].in_features, base) for name in {*readers.values()}}
    lefts = {name: _zeros(layer.weight, layer.out_features, base) for name, layer in layers.items()}
    hooks = [layer.register_forward_hook(_adding(rights.get(name), lefts[name])) for name, layer in layers.items()]
    embedded: list[Tensor] = []  # every output is on the way back to it
    beginning = base.model.embed_tokens
    hooks.append(beginning.register_forward_hook(lambda *call: embedded.append(call[-1].requires_grad_())))
    left = most_tokens(base.config.hidden_size)
    try:
        for score, drawn in scores:
            torch.autograd.grad(score, embedded.pop())
            left -= drawn
            if left <= 0:
                break
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: _eigenvectors(moment) for name, moment in rights.items()}
    return {name: Basis(_eigenvectors(lefts[name]), found[readers[name]]) for name in layers}


def _first_reader(name: str) -> str:
    """Of the layers that read what this one does, by the names of their weights, the first."""
    *path, layer, weight = name.split(".")
    return ".".join([*path, SAME_INPUT.get(layer, layer), weight])


def stored_bases(places: Iterable[Key], state: Mapping[str, Any]) -> dict[Key, Basis]:
    """The bases in a `RotatedAdamW`'s state; `places` are its parameters, or their names, in its groups' order."""
    stored = zip(places, state.get("bases", ()), strict=False)
    return {place: Basis(*sides) for place, sides in stored if sides is not None}


def shared_bases(bases: Mapping[str, Basis], broadcast: Callable[[Any], Any]) -> dict[str, Basis]:
    """The first process's, where several have read: rounding is not the same on all devices, and turns eigenvectors."""
    return _each_side(bases, broadcast)


def moved_bases(bases: Mapping[Key, Basis], device: torch.device | str) -> dict[Key, Basis]:
    """On this device."""
    return _each_side(bases, lambda side: side.to(device))


def _each_side(bases: Mapping[Key, Basis], change: Callable[[Tensor], Tensor]) -> dict[Key, Basis]:
    """With every side changed, once where several bases have it."""
    known: dict[int, Tensor] = {}

    def changed(side: Tensor | None) -> Tensor | None:
        if side is not None and side.data_ptr() not in known:
            known[side.data_ptr()] = change(side)
        return None if side is None else known[side.data_ptr()]

    return {place: Basis(*map(changed, basis)) for place, basis in bases.items()}


def _zeros(weight: Tensor, side: int, base: Transformer) -> Tensor | None:
    return weight.new_zeros(side, side) if side <= base.config.hidden_size else None


def _adding(right: Tensor | None, left: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that adds a layer's inputs (N, C) to the sum of x x^T, and its outputs' gradients to that of g g^T."""

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if right is not None:
            rows = inputs[0].detach().float()
            right.addmm_(rows.t(), rows)
        if left is not None:
            output.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        assert left is not None
        rows = gradient.float()
        left.addmm_(rows.t(), rows)

    return forward


def _eigenvectors(moment: Tensor | None) -> Tensor | None:
    return None if moment is None else torch.linalg.eigh(moment).eigenvectors


def turning(device: torch.device, *, half: bool) -> Turning:
    """How matrices on this device are turned: what to do it under.

    Gradients that come from half precision are turned in bf16 on a CPU, and in TF32 on a GPU, where fp32 would take a
    tenth to a third of such a step. Others are turned in fp32: on an x86 CPU by oneDNN, on AMD in half of the time that
    torch's own choice takes, unless there is AMX, where oneDNN would take bf16, as on other CPUs.
    """
    if half and device.type == "cpu":
        return partial(torch.autocast, "cpu", torch.bfloat16)
    if half and device.type == "cuda":
        return partial(_matmul_precision, "high")
    if device.type == "cpu" and _onednn_keeps_fp32():
        return partial(_matmul_precision, "medium")
    return nullcontext


def _onednn_keeps_fp32() -> bool:
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    return platform.machine() in ("x86_64", "AMD64") and not has_amx


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Multiply fp32 matrices so, see `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class RotatedAdamW(AdamW):
    """AdamW whose moments are kept in the basis of each matrix; without a basis it is AdamW.

    The bases are part of the optimizer's state, so that a run which resumes goes on in the same ones.

    Args:
        args, settings: AdamW's.
        turning: what to turn under, see `turning`.

    Attributes:
        bases: by parameter.
    """

    bases: Mapping[Tensor, Basis]

    def __init__(self, *args: Any, turning: Turning = nullcontext, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.bases = {}
        self._turned = False
        self._turning = turning

    def turn(self, bases: Mapping[Tensor, Basis]) -> None:
        """Take these bases, by parameter; before the first step, for moments do not turn along."""
        self.bases = dict(bases)

    @torch.no_grad()
    def turn_gradients(self) -> None:
        """Turn the gradients into the bases, which `step` does otherwise: for what is to be added or clipped there."""
        if not self._turned:
            with self._turning():
                for weight, basis in self.bases.items():
                    if weight.grad is not None:
                        weight.grad.copy_(basis.turned(weight.grad))
            self._turned = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As always; gradients that come next are in the axes of the weights."""
        super().zero_grad(set_to_none)
        self._turned = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of AdamW from zero, in the bases; turned back, it is added to the weights as they were."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.turn_gradients()
        kept: list[tuple[Tensor, Tensor, float]] = []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight in self.bases:
                    kept.append((weight, weight.clone(), 1.0 - group["lr"] * group["weight_decay"]))
                    weight.zero_()
        super().step()
        self._turned = False
        with self._turning():
            for weight, before, decay in kept:
                weight.copy_(self.bases[weight].back(weight)).add_(before, alpha=decay)
        return loss

    @property
    def _weights(self) -> list[Tensor]:
        """In the order of their places in the state."""
        return [weight for group in self.param_groups for weight in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the bases by the parameters' places."""
        places = [self.bases.get(weight) for weight in self._weights]
        return super().state_dict() | {"bases": [None if basis is None else tuple(basis) for basis in places]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """AdamW's, and the bases; of a run without any there are none."""
        super().load_state_dict(state_dict)
        found = stored_bases(self._weights, state_dict)
        self.bases = moved_bases(found, next(iter(found)).device) if found else {}
