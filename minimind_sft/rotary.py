"""Rotary positions: which angle turns which pair of a head's dimensions, and the known ways to stretch them.

Positions restart at every document, so angles are computed from them, once per forward, and shared by the layers: a few
thousand cosines, against a table of 32,768 rows that would have to be moved, stored or rebuilt. A model trained to a
length reads further if its slow frequencies are slowed down: `linear` slows all alike, `llama3` and `yarn` only those
that would not have turned once. MiniMind's `inference_rope_scaling` is YaRN by 16 from 2,048.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MINIMIND_YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
KEYS = {  # of each kind of scaling: needed, and optional
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "attention_factor", "truncate"},
    ),
}


def check_scaling(scaling: Mapping[str, Any]) -> None:
    """Refuse a scaling that `frequencies` does not know, or knows only in part.

    Raises:
        ValueError: naming the kind or the keys.
    """
    kind = scaling.get("rope_type")
    if kind not in KEYS:
        raise ValueError(f"RoPE scaling {kind!r} is unknown; known are {', '.join(KEYS)}")
    needed, optional = KEYS[kind]
    missing, extra = needed - scaling.keys(), scaling.keys() - needed - optional - {"rope_type"}
    if missing or extra:
        raise ValueError(f"RoPE scaling {kind}: missing {sorted(missing)}, unknown {sorted(extra)}")


def frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, device: torch.device
) -> tuple[Tensor, float]:
    """Angle per position of each pair, (E / 2,) fp32, and what cosines and sines are multiplied by."""
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    if scaling is None:
        return plain, 1.0
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(plain, scaling), 1.0
    factor = scaling["factor"]
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return _yarn(plain, theta, scaling), float(attention_factor)


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Slowed fully below `low_freq_factor` turns in the original length, not at all above `high_freq_factor`."""
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling["factor"])


def _yarn(plain: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Slowed fully from the pair that makes `beta_slow` turns on, not at all up to the one that makes `beta_fast`."""
    head_dim = 2 * len(plain)

    def pair_with(turns: float) -> float:
        share = math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
        return head_dim * share

    first, last = pair_with(scaling.get("beta_fast") or 32), pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(len(plain), device=plain.device).float()
    slowed = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * (1 - slowed + slowed / scaling["factor"])


def cos_sin(positions: Tensor, frequency: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each position, fp32, (N, 1, E / 2): one angle per pair, the same for all heads."""
    angles = positions.float()[:, None, None] * frequency
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (N, H, E), where dimension i is paired with i + E / 2 (the half-split form)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).type_as(x)
