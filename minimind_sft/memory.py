"""What a training step takes, in bytes and in arithmetic, from the sizes of a model alone. No torch.

Memory is counted, not fitted: the terms below are the tensors that autograd keeps for each operation of `model.py` and
`losses.py` (read off with `torch.autograd.graph.saved_tensors_hooks`; tests hold the formula to that count exactly, and
to measured peaks of `fit`). Weights, gradients and AdamW's two moments are fp32: 16 bytes a parameter (Rajbhandari et
al. 2020, arXiv 1910.02054, section 3.1, less its fp16 copies, which autocast makes anew in every forward pass). Bases
for the moments (`fisher.py`) come on top, and in a step the weights as they were before it. Per token and layer, with s
bytes (4, or 2 under autocast) and everything residual in fp32:

    two norms       4 C each; their outputs s C for each projection under autocast (3 and 2 casts), else once
    q and k         4 (H + K) E where they are normed, s (H + K) E rotated; v s K E
    attention       s H E of output (twice where documents are put together again), 4 H of log-sum-exp; a CPU attends
                    in fp32, so that q, k, v and the outputs by document are 4 bytes there
    feed-forward    4 s I: gate, silu(gate), up, and their product

With checkpointing only 4 C stay (Chen et al. 2016, arXiv 1604.06174), and one layer at a time is made again. Logits and
their log-softmax are there a chunk at a time (`chunks.py`), 8 V a row; the gradients of their states and of the output
layer, 4 C a target and 4 V C, are made with them and stay until the backward pass; replay text has 4 V C of its own.

Measured against `fit` on a CPU (live bytes of all tensors): within 1 % from 6 M to 116 M parameters, with and without
checkpointing. What CUDA's kernels keep is read off their signatures (FlashAttention takes ragged batches whole), not
measured. Not counted: the device's context, fragmentation (the resident set of those runs
was 0.1 to 0.5 GiB above the live bytes), what saving takes in host memory, and what q, k and v grow by where a GPU has
to pad documents (`attention.py`).

Shapes: C hidden, H heads, K key/value heads, E head dimension, I feed-forward, L layers, V vocabulary, X experts.
"""

from __future__ import annotations

from typing import NamedTuple

from minimind_sft.chunks import rows_at_once
from minimind_sft.model_config import ModelConfig

FP32, BF16 = 4, 2


class Parameters(NamedTuple):
    """Parameters by what they do."""

    embedding: int  # V C
    head: int  # V C where untied, else 0
    layers: int  # matrices of all layers
    vectors: int  # norms and biases
    active: int  # of what a token is multiplied by, the output layer included: a lookup multiplies nothing
    largest: int  # of one matrix

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.layers + self.vectors


class Footprint(NamedTuple):
    """Bytes of one process in training. `peak` is of what is alive together; the parts are for people to read."""

    weights: int
    gradients: int
    optimizer: int  # two moments
    bases: int  # that the moments are kept in (`fisher.py`)
    pull: int  # towards the base in these: Fisher information in bf16, and the base in fp32 where replay has none
    buckets: int  # of gradients, where several processes share them
    copies: int  # half-precision copies of the matrices, under autocast
    activations: int  # kept between forward and backward pass
    logits: int  # of one chunk, and the gradients of a micro-batch's
    layer: int  # what the backward pass of one layer adds
    peak: int
    phase: str  # in which the peak falls


def parameters(config: ModelConfig) -> Parameters:
    """Parameters of a model."""
    c, e, i = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv = config.num_attention_heads * e, config.num_key_value_heads * e
    attention, feed_forward, router = 2 * c * q + 2 * c * kv, 3 * c * i, c * config.num_experts
    experts = _feed_forwards(config)
    passed = config.num_experts_per_tok + config.num_shared_experts or 1
    biases = config.qkv_bias * (q + 2 * kv) + config.o_bias * c + config.mlp_bias * (2 * i + c)
    vectors = 2 * c + config.qk_norm * 2 * e + biases
    layers, table = config.num_hidden_layers, config.vocab_size * c
    return Parameters(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        layers=layers * (attention + router + experts * feed_forward),
        vectors=layers * vectors + c,
        active=layers * (attention + router + passed * feed_forward) + table,
        largest=max(table, c * i, c * q),
    )


def _feed_forwards(config: ModelConfig) -> int:
    """Of a layer: its experts, or the one."""
    return config.num_experts + config.num_shared_experts or 1


def matrices(config: ModelConfig) -> list[tuple[int, int, int]]:
    """Rows, columns and number of the matrices that multiply, the output layer included."""
    c, e, i, layers = config.hidden_size, config.head_dim, config.intermediate_size, config.num_hidden_layers
    q, kv = config.num_attention_heads * e, config.num_key_value_heads * e
    experts = layers * _feed_forwards(config)
    found = [(q, c, layers), (kv, c, 2 * layers), (c, q, layers), (i, c, 2 * experts), (c, i, experts)]
    return [*found, (config.num_experts, c, layers * (config.num_experts > 0)), (config.vocab_size, c, 1)]


def _turned_sides(config: ModelConfig) -> list[tuple[int, int, int, int]]:
    """`matrices`, once for each side that is no wider than the model, with its size: `fisher.py` turns no other."""
    return [
        (rows, columns, number, side)
        for rows, columns, number in matrices(config)
        for side in (rows, columns)
        if side <= config.hidden_size
    ]


def basis_bytes(config: ModelConfig) -> int:
    """Of one square matrix for each side that is turned; q, k and v have one, and gate and up."""
    sides = sum(number * side * side for _, _, number, side in _turned_sides(config))
    shared = config.num_hidden_layers * (2 + _feed_forwards(config)) * config.hidden_size**2
    return FP32 * (sides - shared)


def checkpoint_bytes(config: ModelConfig, *, bases: bool) -> int:
    """Weights and two moments in fp32, and the bases that these are kept in."""
    return 3 * FP32 * parameters(config).total + bases * basis_bytes(config)


def basis_flops(config: ModelConfig) -> int:
    """Operations of one step to turn all gradients into their bases, and what comes of them back."""
    return sum(4 * number * rows * columns * side for rows, columns, number, side in _turned_sides(config))


def layer_bytes(config: ModelConfig, *, half: bool, cuda: bool) -> int:
    """Kept per token in one layer, what goes into it included; see the module's table."""
    c, s = config.hidden_size, 2 if half else FP32
    heads, kv_heads, e = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    norm = FP32  # of each element normed: its input, or what comes of that before the weight
    reciprocal = FP32  # of the root mean square, one per row
    casts = 1 if not half else 3  # q, k and v take copies of their own; an fp32 output serves all three
    size = norm * c + reciprocal + casts * s * c
    if config.qk_norm:
        size += (heads + kv_heads) * (norm * e + reciprocal)
    attended = s if cuda else FP32  # a CPU attends in fp32
    size += attended * (heads + 2 * kv_heads) * e
    size += (s if cuda and half else attended + s) * heads * e + FP32 * heads
    return size + norm * c + reciprocal + _feed_forward_bytes(config, s, half)


def _feed_forward_bytes(config: ModelConfig, s: int, half: bool) -> int:
    """Of the rows that go into a feed-forward layer, and what it keeps of them."""
    c = config.hidden_size
    inputs = (2 if half else 1) * s * c  # gate and up; an fp32 input serves both
    inside = 4 * s * config.intermediate_size
    if not config.num_experts:
        return inputs + inside
    k, experts, shared = config.num_experts_per_tok, config.num_experts, config.num_shared_experts
    router = s * c + FP32 * experts + 8 * k  # its input, probabilities, and which were chosen
    places = k * (2 * 8 + FP32)  # the way to the experts and back, and a weight
    routed = k * (inputs + inside + s * c)  # the outputs, which are weighted
    return router + places + routed + shared * (inside + (inputs if half else 0))


def footprint(
    config: ModelConfig,
    *,
    tokens: int,
    targets: int,
    precision: str,
    cuda: bool,
    activation_checkpointing: bool,
    accumulate: int = 1,
    processes: int = 1,
    bases: bool = False,
    pull: bool = False,
    replayed: int = 0,
) -> Footprint:
    """What one process holds when it holds most.

    Gradients of the step before are there until the first backward pass of a window begins, and from the second on.
    A tied head's gradient waits for the embedding's, which is dense, and the sum of both is a third such table.

    Args:
        tokens: of the largest micro-batch.
        targets: supervised ones among them.
        precision: ``32``, ``bf16-mixed`` or ``16-mixed``.
        cuda: whether it runs on a GPU, whose kernels keep less.
        activation_checkpointing: see `model.Transformer`.
        accumulate: micro-batches per window.
        processes: that share gradients.
        bases: whether AdamW's moments are kept in a basis for each matrix.
        pull: whether the model is pulled towards the base in these (`priors.EKFAC`).
        replayed: tokens of replay text among them, held by KL; the base's copy is not counted.
    """
    count, half = parameters(config), precision != "32"
    s = 2 if half else FP32
    gradients = FP32 * count.total
    absent = gradients if accumulate == 1 else 0  # when the backward pass begins
    table = FP32 * count.embedding
    waiting = table if config.tie_word_embeddings else 0
    layer, into_layer = layer_bytes(config, half=half, cuda=cuda) * tokens, FP32 * config.hidden_size * tokens
    rows = s * config.hidden_size * (targets + replayed)
    ends = into_layer + rows + 24 * tokens  # last norm, rows, ids
    activations = ends + config.num_hidden_layers * (into_layer if activation_checkpointing else layer)
    head_copy, layer_copy = (2 * count.embedding, 2 * count.layers // config.num_hidden_layers) if half else (0, 0)
    copies = head_copy + layer_copy * config.num_hidden_layers
    made, unmade = _logits_bytes(config, targets, replayed, half=half, cuda=cuda)
    passing = _passing_bytes(config, tokens, s)
    last = layer + layer_copy + passing + (waiting if accumulate > 1 else 0)
    if activation_checkpointing:  # a layer is made again, and none but its copies are there
        passing += layer - into_layer
    held = (head_copy, layer_copy) if activation_checkpointing else (copies, copies)
    first = activations - ends + held[1] + passing + waiting - absent
    phases = {
        "the end of the forward pass": activations + copies + into_layer + made,
        "the backward pass of the output layer": activations + held[0] + unmade - absent,
        "the backward pass of a layer": max(first, last),
        "the backward pass of the embedding": table + (2 if accumulate > 1 else 1) * waiting + into_layer,
        "the optimizer's step": _step_bytes(count, precision, cuda) + bases * FP32 * (count.total - count.vectors),
    }
    phase = max(phases, key=lambda name: phases[name])
    shares_base = replayed and not half  # with the KL, whose copy of the base is not counted here
    pulling = pull * count.total * (BF16 if shares_base else BF16 + FP32)
    fixed = gradients, gradients, 2 * gradients, bases * basis_bytes(config), pulling, gradients * (processes > 1)
    return Footprint(
        *fixed,
        copies=copies,
        activations=activations,
        logits=max(made, unmade),
        layer=passing,
        peak=sum(fixed) + phases[phase],
        phase=phase,
    )


def _logits_bytes(config: ModelConfig, targets: int, replayed: int, *, half: bool, cuda: bool) -> tuple[int, int]:
    """Gradients of the states and of the output layer, and a chunk of logits with their log-softmax; then the
    gradients, and times what is above. Replay has an output layer's gradient of its own, and the base's logits."""
    most, more = rows_at_once(config.vocab_size, "cuda" if cuda else "cpu"), replayed > 0
    to_states, to_layer = (FP32 * config.hidden_size * rows for rows in (targets + replayed, config.vocab_size))
    chunk, chunk_of_replay = (
        (arrays * FP32 + 2 * half) * min(rows, most) * config.vocab_size
        for arrays, rows in ((2, targets), (4, replayed))
    )
    made = to_states + max(to_layer + chunk, more * (2 * to_layer + chunk_of_replay))
    return made, 2 * to_states + (2 + more) * to_layer


def _passing_bytes(config: ModelConfig, tokens: int, s: int) -> int:
    """What a layer's backward pass makes: gradients of gate and up, of the residual, of the largest matrix."""
    rows = (config.num_experts_per_tok or 1) * tokens
    residual, matrix = FP32 * config.hidden_size * tokens, FP32 * config.hidden_size * config.intermediate_size
    return 2 * s * config.intermediate_size * rows + 2 * residual + matrix


def _step_bytes(count: Parameters, precision: str, cuda: bool) -> int:
    """What AdamW makes in passing: one matrix at a time on a CPU, nothing where it is one kernel, else all at once."""
    if not cuda:
        return 2 * FP32 * count.largest
    return FP32 * count.total if precision == "16-mixed" else 0


def training_flops(
    config: ModelConfig, *, tokens: float, squared_lengths: float, activation_checkpointing: bool
) -> float:
    """Floating-point operations of training on documents: 6 N per token, and attention.

    6 = 2 (multiply, add) x 3 (forward, and two products in the backward pass), N the parameters that a token is
    multiplied by (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Causal attention takes 6 L H E t^2 for a document
    of t tokens: two products of 2 t^2 H E, halved by causality, times 3. Checkpointing runs the layers forward twice.

    Args:
        tokens: of all documents.
        squared_lengths: sum of the squares of their lengths.
    """
    count = parameters(config)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    head = config.vocab_size * config.hidden_size
    layers = 6 * (count.active - head) * tokens + 6 * width * squared_lengths
    return 6 * head * tokens + layers * (4 / 3 if activation_checkpointing else 1)
