"""One growing text and its KV cache: what a chat needs that `generate.py`, which starts from whole prompts, has not.

A prompt is read only from where it parts from what is in the cache; the rest of the cache is dropped. So a second turn
costs its own tokens, and a template that renders an old turn differently later (an empty think block left out) costs a
second reading and never a wrong one. What comes out are the tokens of `generate.generate` for the prompt alone.

Shapes: T tokens read together, S tokens in the cache, H query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_sft.attention import Attend
from minimind_sft.generate import SLOTS, Sampling
from minimind_sft.model import Transformer

READ = 512  # tokens of a prompt read together: bounds the mask to READ x S


class Continuation:
    """A text, token by token, with the keys and values of every layer.

    Attributes:
        ids: the tokens whose keys and values are known.
        read: tokens that went through the model so far, prompts included.
    """

    def __init__(self, model: Transformer) -> None:
        self.model, self.device = model, model.model.embed_tokens.weight.device
        self.ids: list[int] = []
        self.read = 0
        self._keys: list[Tensor] = []  # per layer (S', K, E), filled up to len(ids)
        self._values: list[Tensor] = []

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        turn: int = 0,
        stop_ids: Collection[int] = frozenset(),
    ) -> Iterator[int]:
        """Yield the tokens that follow, each as soon as it is known, the one that ends the answer included.

        Args:
            prompt: everything so far, not only what is new.
            max_new_tokens: tokens written at most.
            sampling: how a token is chosen.
            turn: picks the random numbers: turn 3 draws its own from the same seed.
            stop_ids: the answer ends after one of these.

        Raises:
            ValueError: an empty prompt.
        """
        if not len(prompt):
            raise ValueError("the prompt is empty; a model needs at least one token to continue from")
        luck = sampling.draws(turn, max_new_tokens)
        new = list(prompt[self._keep(prompt) :])
        for number in range(max_new_tokens):
            with torch.inference_mode():  # not while suspended: whoever reads the tokens may train
                hidden = self._feed(new)
                token = int(sampling.choose(self.model.logits(hidden[None]), luck[number : number + 1]))
            yield token
            if token in stop_ids:
                return
            new = [token]

    def _keep(self, prompt: Sequence[int]) -> int:
        """Drop what the prompt does not begin with; how many tokens are left. One at least is read anew."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, prompt, strict=False)))
        del self.ids[min(same, len(prompt) - 1) :]
        return len(self.ids)

    def _feed(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens behind the cache; the hidden state (C,) of the last one."""
        hidden = torch.empty(0)
        for start in range(0, len(tokens), READ):
            block = tokens[start : start + READ]
            first, end = len(self.ids), len(self.ids) + len(block)
            positions = torch.arange(first, end, device=self.device)
            attends = [self._attend(layer, first, end) for layer in range(self.model.config.num_hidden_layers)]
            hidden, _ = self.model.run_layers(torch.tensor(block, device=self.device), positions, attends)
            self.ids += block
            self.read += len(block)
        return hidden[-1]

    def _attend(self, layer: int, first: int, end: int) -> Attend:
        """Attention of tokens `first` to `end` over all before them, whose keys and values it lays into the cache."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = (self._lay(store, layer, new, first) for store, new in ((self._keys, k), (self._values, v)))
            visible = None
            if first and end - first > 1:
                visible = torch.ones(end - first, end, dtype=torch.bool, device=q.device).tril(first)  # (T, S)
            out = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],  # (1, H, T, E) over (1, K, S, E)
                keys[:end].transpose(0, 1)[None],
                values[:end].transpose(0, 1)[None],
                attn_mask=visible,
                is_causal=first == 0,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            return out[0].transpose(0, 1)

        return attend

    @staticmethod
    def _lay(stores: list[Tensor], layer: int, new: Tensor, first: int) -> Tensor:
        """Put new keys or values behind the first ones, in a larger store where they do not fit."""
        end = first + len(new)
        if layer == len(stores):
            stores.append(new.new_empty(0, *new.shape[1:]))
        if end > len(stores[layer]):
            room = new.new_zeros(max(end + SLOTS, len(stores[layer]) * 3 // 2), *new.shape[1:])
            room[:first] = stores[layer][:first]
            stores[layer] = room
        stores[layer][first:end] = new
        return stores[layer]
