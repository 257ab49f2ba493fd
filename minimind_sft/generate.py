"""Decoding with a KV cache, outside the model's forward: prompts of token ids in, answers of token ids out.

The model's layers are used as they are; only the attention handed to them differs. Prompts are read as one flat batch,
like a training batch, and their keys and values are laid into caches of one row per prompt, padded on the right; then
every step feeds one token per row. A row that is done leaves the batch once half of the rows are.

What comes out does not depend on company: greedy decoding gives the tokens of uncached decoding of each prompt alone,
and sampling draws prompt i's random numbers from (seed, i), not from the batch. The one caveat is rounding, which
differs between shapes and decides where two tokens are tied to about 1e-6. Nothing in the model depends on train or
eval mode, so the mode is left alone.

Shapes: B rows still being written, S cache slots, H query heads, K key/value heads, E head dimension, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minimind_sft.attention import Attend, attention_over_documents, backend_by_lengths
from minimind_sft.drawing import draw, running_sums
from minimind_sft.model import Transformer

SLOTS = 128  # caches grow by at least this many
# all but cuDNN's, which makes a plan for every length of the cache
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = frozenset(),
    vocab_size: int | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        model: on any device; gradients are not touched.
        prompts: token ids, at least one each, of any lengths.
        max_new_tokens: tokens written per prompt at most.
        temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
        top_k: sample among this many likeliest tokens; None or 0 for all.
        top_p: sample among the likeliest tokens that together reach this probability; None or 1 for all.
        seed: of the sampling.
        stop_ids: a row ends after one of these, and keeps it: an answer without one was cut off.
        vocab_size: write only ids below this one, where the model has more rows than the tokenizer has tokens.
        batch_size: prompts decoded together; bounds the memory of the caches.

    Returns:
        The new tokens of each prompt, in the order of the prompts.

    Raises:
        ValueError: an empty prompt, or a sampling setting out of range.
    """
    sampling = Sampling(temperature, top_k or None, top_p, seed, vocab_size)
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        decoder = _Decoder(model, batch, range(start, start + len(batch)), max_new_tokens, sampling, stop_ids)
        while decoder.rows:
            for row, token in decoder.step():
                answers[row].append(token)
    return answers


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. Arguments as in `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more, or 0 for all tokens")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def draws(self, row: int, count: int) -> Tensor:
        """(count,) float64 in [0, 1): the luck of one prompt, whatever company it is in."""
        if self.temperature == 0.0:
            return torch.zeros(count, dtype=torch.float64)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + row) % 2**63)
        return torch.rand(count, dtype=torch.float64, generator=generator)

    def choose(self, logits: Tensor, luck: Tensor) -> Tensor:
        """(B, V) logits and (B,) draws -> (B,) token ids, by inverting the cumulative distribution."""
        logits = logits[:, : self.vocab_size]
        if self.temperature == 0.0:
            return logits.argmax(-1)
        scaled, order = logits.float() / self.temperature, None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            scaled, order = scaled.topk(self.top_k)
        elif self.top_p is not None and self.top_p < 1.0:
            scaled, order = scaled.sort(descending=True)
        wide = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no float64
        probabilities = scaled.softmax(-1).to(wide)
        if self.top_p is not None and self.top_p < 1.0:
            before = running_sums(probabilities) - probabilities
            probabilities = probabilities.masked_fill(before > self.top_p, 0.0)
        index = draw(probabilities, luck)
        return (index if order is None else order.gather(-1, index))[:, 0]


class _Decoder:
    """Rows being written together. `rows` are the callers' numbers of those still alive."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int],
    ) -> None:
        empty = [row for row, prompt in zip(rows, prompts, strict=True) if not len(prompt)]
        if empty:
            raise ValueError(f"prompt {empty[0]} is empty; a model needs at least one token to continue from")
        self.model, self.sampling, self.stop_ids = model, sampling, frozenset(stop_ids)
        self.device = model.model.embed_tokens.weight.device
        self.prompts, self.max_new_tokens, self.written = prompts, max_new_tokens, 0
        self.rows = list(rows) if max_new_tokens > 0 else []  # the caller's number of every batch row; -1: done
        self.luck = torch.stack([sampling.draws(row, max_new_tokens) for row in rows])  # (B, max_new_tokens)
        self.tokens = torch.empty(0)  # (B,) the last written

    @torch.inference_mode()
    @sdpa_kernel(KERNELS)
    def step(self) -> list[tuple[int, int]]:
        """Write one token in every row that is alive.

        Returns:
            (row, token) pairs.
        """
        hidden = self._read_prompts() if self.written == 0 else self._feed(self.tokens)  # (B, C)
        self.tokens = self.sampling.choose(self.model.logits(hidden), self.luck[:, self.written])
        self.written += 1
        chosen = self.tokens.tolist()  # the one wait for the device per step
        news = [(row, token) for row, token in zip(self.rows, chosen, strict=True) if row >= 0]
        if self.written == self.max_new_tokens:
            self.rows = [-1] * len(self.rows)
        self.rows = [-1 if token in self.stop_ids else row for row, token in zip(self.rows, chosen, strict=True)]
        self._drop_finished()
        return news

    def _read_prompts(self) -> Tensor:
        lengths = [len(prompt) for prompt in self.prompts]
        ends = torch.tensor(lengths).cumsum(0)
        input_ids = torch.tensor([token for prompt in self.prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        row_of_token = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(self.device)
        attend = attention_over_documents(backend_by_lengths(self.device), F.pad(ends, (1, 0)).int(), max(lengths))
        self.cache = _Cache(self.model.config.num_hidden_layers, lengths, self.device)
        attends = [self.cache.record(layer, attend, row_of_token, positions) for layer in range(self.cache.layers)]
        hidden, _ = self.model.run_layers(input_ids, positions, attends)
        return hidden[(ends - 1).to(self.device)]

    def _feed(self, tokens: Tensor) -> Tensor:
        positions = self.cache.open_slot()
        attends = [self.cache.extend(layer) for layer in range(self.cache.layers)]
        return self.model.run_layers(tokens, positions, attends)[0]

    def _drop_finished(self) -> None:
        alive = [index for index, row in enumerate(self.rows) if row >= 0]
        if 2 * len(alive) > len(self.rows):
            return
        self.rows = [self.rows[index] for index in alive]
        if alive:
            keep = torch.tensor(alive)
            self.luck, self.tokens = self.luck[keep], self.tokens[keep.to(self.device)]
            self.cache.keep(alive)


class _Cache:
    """Keys and values of every layer, (B, S, K, E), each row filled from the left.

    How many slots of a row are in use is kept on the host, so that nothing waits for the device.
    """

    def __init__(self, layers: int, lengths: list[int], device: torch.device) -> None:
        self.layers, self.lengths, self.device = layers, lengths, device
        self.capacity = max(lengths) + SLOTS
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.mask: Tensor | None = None

    def record(self, layer: int, attend: Attend, rows: Tensor, positions: Tensor) -> Attend:
        """Attention over the prompts that also lays their keys and values into the cache."""

        def attend_and_record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for store, new in ((self.keys, k), (self.values, v)):
                assert len(store) == layer, "layers run in order"
                store.append(new.new_zeros(len(self.lengths), self.capacity, *new.shape[1:]))
                store[layer][rows, positions] = new
            return attend(q, k, v)

        return attend_and_record

    def open_slot(self) -> Tensor:
        """Make room for one more token in every row, and let attention see it.

        Returns:
            (B,) the position of that token.
        """
        self.lengths = [length + 1 for length in self.lengths]
        self.longest = max(self.lengths)
        if self.longest > self.capacity:
            more = max(SLOTS, self.capacity // 2)
            self.capacity += more
            self.keys = [F.pad(keys, (0, 0, 0, 0, 0, more)) for keys in self.keys]
            self.values = [F.pad(values, (0, 0, 0, 0, 0, more)) for values in self.values]
        lengths = torch.tensor(self.lengths, device=self.device)
        self.rows, self.slots = torch.arange(len(lengths), device=self.device), lengths - 1
        visible = torch.arange(self.longest, device=self.device) < lengths[:, None]
        self.mask = visible[:, None, None] if min(self.lengths) < self.longest else None  # (B, 1, 1, S)
        return self.slots

    def extend(self, layer: int) -> Attend:
        """Attention of one new token per row over everything before it in its row."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for store, new in ((self.keys, k), (self.values, v)):
                store[layer][self.rows, self.slots] = new
            keys, values = (store[layer][:, : self.longest].transpose(1, 2) for store in (self.keys, self.values))
            out = F.scaled_dot_product_attention(  # (B, H, 1, E) over (B, K, S, E)
                q[:, :, None], keys, values, attn_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out[:, :, 0]

        return attend

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        index = torch.tensor(rows, device=self.device)
        self.keys, self.values = [keys[index] for keys in self.keys], [values[index] for values in self.values]
