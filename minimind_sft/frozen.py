"""What is not trained: parameters that `model.freeze` names, and the copy of the base that the model is held to."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor

from minimind_sft.model import Transformer


def freeze(model: Transformer, patterns: Sequence[str]) -> None:
    """Train no parameter whose name matches one of the patterns, as in a shell.

    Raises:
        ValueError: a pattern that matches nothing; nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(f"model.freeze: no parameter is called {pattern!r}; there are {', '.join(names)[:400]}")
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model.freeze {list(patterns)} leaves nothing to train")


def frozen_copy(model: Transformer, head: Tensor | None) -> Transformer:
    """A copy that is not trained. Where an output layer (V, C) is given, the copy reads with that one, and has no
    parameter `lm_head.weight`: the model's is new, and nothing to be held to."""
    base = copy.deepcopy(model).requires_grad_(False).eval()
    if head is not None:
        head = head.to(base.model.embed_tokens.weight)  # the model may have moved since
        more = base.config.vocab_size - len(head)  # a vocabulary that was resized, as `Transformer.resize_vocab` does
        rows = torch.cat([head, head.mean(0, keepdim=True).expand(more, -1)]).detach().clone()
        del base.lm_head.weight
        base.lm_head.register_buffer("weight", rows)  # not a parameter, which terms would pull the new one towards
    return base
