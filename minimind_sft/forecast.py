"""`fit --plan`: what a run will take, told before anything is built.

Settings come in, text goes out: sizes and data as `sizing.py` finds them, bytes and operations as `memory.py` counts
them. What is assumed is said where it is used, and no speed of any device is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minimind_sft import memory, report
from minimind_sft.chat import ChatTemplate
from minimind_sft.model_config import ModelConfig
from minimind_sft.replay_chat import ChatFrame
from minimind_sft.sizing import Data, look_at, model_config, template_of

GIB = 1 << 30
CARDS = (8, 16, 24, 80)  # GiB
SPARE = 0.1  # of a card, for the CUDA context and fragmentation; assumed
BASE_COPY = {"fp16": 2, "fp32": 4}  # bytes a parameter
TFLOPS = (0.1, 1.0, 10.0, 100.0)


def forecast(
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
    device: str,
    precision: str,
    val_every: int | None,
    keep_every: int | None,
    tflops: float | None,
) -> str:
    """The plan as text.

    Args:
        model, data, trainer: settings, as `fit` takes them.
        device, precision: likewise; ``auto`` is a GPU with bf16.
        val_every: steps between looks at the model; None for as often as costs 5 %.
        keep_every: steps between milestones.
        tflops: the throughput that the user counts on, in 10^12 operations per second.

    Raises:
        ValueError: where the model's sizes cannot be found out, or a setting is impossible.
    """
    if tflops is not None and not tflops > 0:
        raise ValueError(f"--plan_tflops is {tflops}; it is 10^12 operations per second and must be above 0")
    accumulate, ranks = trainer["accumulate_grad_batches"], _processes(device, trainer)
    for name, value in (("data.batch_size", data["batch_size"]), ("trainer.accumulate_grad_batches", accumulate)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    template = template_of(data["tokenizer"])
    config, source = model_config(model, template.vocab_size if template else None)
    cuda = device != "cpu"
    precision = ("bf16-mixed" if cuda else "32") if precision == "auto" else precision
    from_base = model["weights"] != "scratch"
    replay = data["replay_ratio"] if model["replay_weight"] and from_base else 0.0
    bases, pull = (from_base and bool(model[name]) for name in ("fisher_tokens", "prior_tokens"))
    tokens, replayed, bound = _micro_batch(data, replay, template)
    known, count = look_at(data, template), memory.parameters(config).total
    window = data["batch_size"] * accumulate * ranks
    steps = _steps(known, window, trainer)
    plain, checkpointing = (
        memory.footprint(
            config,
            tokens=tokens,
            targets=tokens - replayed,
            precision=precision,
            cuda=cuda,
            activation_checkpointing=on,
            accumulate=accumulate,
            processes=ranks,
            bases=bases,
            pull=pull,
            replayed=replayed,
        )
        for on in (False, True)
    )
    rows = [
        ("model", source),
        ("parameters", f"{count:,} ({_shape(config)})"),
        ("planned for", f"a {'GPU' if cuda else 'CPU'}, precision {precision}, processes: {ranks}"),
        ("micro-batch", f"at most {tokens:,} tokens ({bound}), all of them supervised at worst; {accumulate} a step"),
        ("data", known.told if known else f"not found: {data['train_path']}"),
        ("steps", f"about {steps:,}" if steps else "unknown without the data; set trainer.max_steps"),
        ("disk", _disk(memory.checkpoint_bytes(config, bases=bases), known, steps, keep_every, config.vocab_size)),
    ]
    on = bool(model["activation_checkpointing"])
    parts = [
        report.aligned(rows),
        _memory_table(plain, checkpointing, on),
        _cards(plain, checkpointing, count, "fp32" if precision == "32" else "fp16"),
    ]
    if known and steps:
        epochs = steps / math.ceil(known.documents / window)
        turns = bases + pull  # AdamW's and the pull's
        turning = steps * turns * memory.basis_flops(config)
        looks = "about 5 % more"
        if val_every is not None:
            looks = f"not counted (every {val_every:,} steps; val_every_steps null: {looks})"
        parts.append(_time(config, known, epochs, on, tflops, replay, turning, looks))
    return "\n\n".join(parts)


def _micro_batch(data: Mapping[str, Any], replay: float, template: ChatTemplate | None) -> tuple[int, int, str]:
    """Tokens of the largest one, those of replay text among them, and what bounds it.

    Even dealing never gives one more than batch_size x max_length: the last chat that a micro-batch gets goes to the
    emptiest, which has fewer than batch_size chats by then. Replay text adds its share and a piece, as that goes whole
    to the emptiest as well; for a chat around a piece, all pieces are taken to be half as long as they may be.
    """
    chats, replayed = data["batch_size"] * data["max_length"], 0
    told, bound = f"{data['batch_size']} x {data['max_length']}", data["max_tokens_per_batch"]
    if replay:
        piece, framed = min(data["replay_length"] or data["max_length"], data["max_length"]), 1.0
        if data["replay_in_chat"] and template:
            framed += data["replay_in_chat"] * ChatFrame.of(template).size / (piece / 2)
        replayed = int((replay * chats + piece) * framed)
        told += f", {replay:g} of it replayed, and a piece of {piece}"
    most = chats + replayed
    if bound is not None and bound < most:
        return bound, int(bound * replayed / most), "data.max_tokens_per_batch"
    return most, replayed, told


def _processes(device: str, trainer: Mapping[str, Any]) -> int:
    """As far as the settings say: 4, "4", "0,1" and [0, 1] are numbers of devices, `auto` is one."""
    pinned = device.startswith("cuda:") and trainer["devices"] == "auto"
    devices = device.removeprefix("cuda:") if pinned else trainer["devices"]
    if isinstance(devices, str):
        devices = int(devices) if devices.isdigit() and not pinned else devices.count(",") + 1
    count = len(devices) if isinstance(devices, (list, tuple)) else int(devices)
    return max(1, count) * int(trainer["num_nodes"])


def _steps(known: Data | None, window: int, trainer: Mapping[str, Any]) -> int | None:
    bounds = [trainer["max_steps"]] if trainer["max_steps"] > 0 else []
    if known and (trainer["max_epochs"] or 0) > 0:
        bounds.append(math.ceil(known.documents / window) * trainer["max_epochs"])
    return min(bounds, default=None)


def _shape(config: ModelConfig) -> str:
    experts = f", {config.num_experts} experts, {config.num_experts_per_tok} a token" if config.num_experts else ""
    return (
        f"{config.num_hidden_layers} layers of {config.hidden_size}, feed-forward {config.intermediate_size}{experts}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} kv) of {config.head_dim}, vocabulary "
        f"{config.vocab_size}, head {'tied' if config.tie_word_embeddings else 'untied'}"
    )


def _disk(each: int, known: Data | None, steps: int | None, keep_every: int | None, vocab_size: int) -> str:
    """Checkpoints hold weights, moments and their bases; a new one is written before the old one goes."""
    milestones = (steps or 0) // keep_every if keep_every else 0
    total = (3 + milestones) * each
    tokens = known.documents * known.tokens * (2 if vocab_size <= 1 << 16 else 4) if known else 0
    kept = f" and {milestones} milestones" if milestones else ""
    return (
        f"{_gib(total + tokens)} GiB: last and best{kept} of {_gib(each)}, one more while saving (the exports take its "
        f"place at the end), tokens {_gib(tokens)}"
    )


def _memory_table(plain: memory.Footprint, checkpointing: memory.Footprint, on: bool) -> str:
    names = (
        ("weights, fp32", "weights"),
        ("gradients, fp32", "gradients"),
        ("AdamW's two moments, fp32", "optimizer"),
        ("the bases they are kept in, fp32", "bases"),
        ("the pull towards the base", "pull"),
        ("gradients to be shared (DDP)", "buckets"),
        ("half-precision copies of the matrices", "copies"),
        ("activations kept for the backward pass", "activations"),
        ("logits and their gradients", "logits"),
        ("one layer in its backward pass", "layer"),
        ("peak (not all of it is there at once)", "peak"),
    )
    rows = [
        [name, *(_gib(getattr(found, key)) for found in (plain, checkpointing))]
        for name, key in names
        if getattr(plain, key)
    ]
    rows.append(["  falls in", *(found.phase.removeprefix("the ") for found in (plain, checkpointing))])
    for dtype, size in BASE_COPY.items():
        rows.append([f"base copy, when replay is on, {dtype}", *[_gib(plain.weights / memory.FP32 * size)] * 2])
    marks = ("", " (as set)") if on else (" (as set)", "")
    head = ["memory of one process, GiB", f"plain{marks[0]}", f"activation_checkpointing{marks[1]}"]
    return report.table(head, rows)


def _cards(plain: memory.Footprint, checkpointing: memory.Footprint, count: int, dtype: str) -> str:
    """Where it fits, also with a base copy of this type."""
    copy = BASE_COPY[dtype] * count
    rows = [
        [name, *("fits" if size <= (1 - SPARE) * card * GIB else "does not" for card in CARDS)]
        for name, size in (
            ("plain", plain.peak),
            (f"plain, with a base copy in {dtype}", plain.peak + copy),
            ("activation_checkpointing", checkpointing.peak),
            (f"activation_checkpointing, with a base copy in {dtype}", checkpointing.peak + copy),
        )
    ]
    head = [f"beside a card's memory, {SPARE:.0%} left for the rest (assumed)", *(f"{card} GB" for card in CARDS)]
    return report.table(head, rows)


def _time(
    config: ModelConfig,
    known: Data,
    epochs: float,
    checkpointing: bool,
    tflops: float | None,
    replay: float,
    turning: int,
    looks: str,
) -> str:
    """Minutes at a throughput that is given, or at each of several; text to replay is taken to be as long as the chats,
    and goes forward through the base as well, a third of what training on it takes. Turning into bases comes on top.
    """
    tokens = epochs * known.documents * known.tokens
    trained = memory.training_flops(
        config,
        tokens=tokens,
        squared_lengths=epochs * known.documents * known.squares,
        activation_checkpointing=checkpointing,
    )
    needed = trained * (1 + 4 / 3 * replay) + turning
    told = (
        f"{needed:.2e} operations for {tokens:,.0f} tokens{f' and {replay:g} of it replayed' if replay else ''}: "
        f"6 N a token and 6 L H E t^2 for the attention of a document"
        f"{', layers forward twice' if checkpointing else ''}; looking at the model is {looks}"
    )
    where = "by --plan_tflops" if tflops else "no claim about any device; give yours with --plan_tflops"
    rows = [[f"{speed:g}", _short(needed / (speed * 1e12) / 60)] for speed in ((tflops,) if tflops else TFLOPS)]
    return f"{told}\n" + report.table([f"at so many TFLOP/s ({where})", "minutes"], rows)


def _gib(size: float) -> str:
    return _short(size / GIB)


def _short(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.2g}"
