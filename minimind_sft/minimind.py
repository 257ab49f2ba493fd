"""MiniMind's own file, out: what the original's `eval_llm.py` and its forks load with `strict=True`.

One fp16 tensor per name, the tied head under both of its names. The file says nothing about how the model computes, so
a model that computes otherwise than MiniMind's (another theta, biases, an untied head) is refused: it would be read as
another model without a word.
"""

import os
from pathlib import Path

import torch

from minimind_sft.checkpoint_files import EMBEDDING, HEAD, listing
from minimind_sft.files import sync_folder
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.rotary import MINIMIND_YARN


def export_minimind(model: Transformer, path: str | Path) -> None:
    """Write the original's file: fp16, every name it expects, the tied head present and sharing its storage.

    The file appears under its name only when complete.

    Args:
        model: any device, any type.
        path: where to; an existing file is replaced.

    Raises:
        ValueError: as `check_holds` does, or if a weight does not fit fp16.
    """
    path = Path(path)
    check_holds(model.config, path)
    state = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in model.state_dict().items()}
    overflown = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if overflown:
        raise ValueError(f"cannot export to {path}: not finite in fp16: {listing(overflown)}")
    state[HEAD] = state[EMBEDDING]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_holds(config: ModelConfig, path: Path) -> None:
    """Refuse a model that the format cannot hold.

    Raises:
        ValueError: if the head is untied (the original ties it on loading, so one of the two matrices would be lost),
            or the model computes otherwise than MiniMind's (tensors do not tell, so it would be read as another model).
    """
    if others := _unlike_minimind(config):
        raise ValueError(
            f"cannot export to {path}: MiniMind's file format holds MiniMind's models only, and this one has "
            f"{', '.join(others)}; export it as format hf"
        )
    if not config.tie_word_embeddings:
        raise ValueError(
            f"cannot export to {path}: the output layer is untied (model.reset_head), and MiniMind's file format has "
            "one matrix for both output layer and embedding"
        )


def file_name(name: str, config: ModelConfig) -> str:
    """The original's name for a file: `full_sft_768.pth`, `full_sft_768_moe.pth`."""
    return f"{name}_{config.hidden_size}{'_moe' if config.num_experts else ''}.pth"


def untold(config: ModelConfig) -> str:
    """What whoever reads the file must be told, since tensors do not tell and it is not the family's: behind the file's
    name; empty where there is nothing."""
    twin = (ModelConfig.minimind3 if config.qk_norm else ModelConfig.minimind2)(num_experts=config.num_experts)
    names = [*([] if config.qk_norm else ["num_attention_heads"]), "num_experts_per_tok"]
    found = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) != getattr(twin, name)]
    return f" (whose reader must be told {' and '.join(found)})" if found else ""


def _unlike_minimind(config: ModelConfig) -> list[str]:
    """What of a model its tensors do not tell, and is not MiniMind's."""
    make = ModelConfig.minimind3 if config.qk_norm else ModelConfig.minimind2
    twin = make(num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok or 1)
    names = ["rms_norm_eps", "rope_theta", "qkv_bias", "o_bias", "mlp_bias"]
    names += ["norm_topk_prob"] if config.num_experts else []
    found = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) != getattr(twin, name)]
    if config.rope_scaling not in (None, MINIMIND_YARN):
        found.append("a RoPE scaling")
    return found
