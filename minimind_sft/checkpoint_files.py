"""Files of weights, as they are: tensors by name out of any supported file, running no code that it may hold.

Read are the original's ``.pth`` and half-run ``*_resume.pth``, ``.safetensors``, and our own Lightning checkpoints, all
with or without the prefixes that DistributedDataParallel and torch.compile leave. Archives are memory-mapped, so a
0.9 B checkpoint costs no memory until it is converted. What the tensors must be is decided in `weights.py`.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
DATA = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".gz", ".zst")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OURS = "minimind_sft"  # what a run notes in its checkpoints
LISTED = 20  # things spelled out in one error; the rest are counted


class RawCheckpoint(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]  # by canonical name, in the type they have in the file
    model_config: Mapping[str, Any] | None  # fields of ModelConfig, where it is a checkpoint of ours


def find_file(source: Path) -> Path:
    """The file meant: itself, or the only one in a folder.

    Raises:
        ValueError: nothing there, or several.
    """
    if not source.exists():
        raise ValueError(
            f"weights {source} do not exist; what is taken is a file, a folder, a run directory, hf:owner/name on the "
            "hub, or (to train) scratch"
        )
    if not source.is_dir():
        return source
    found = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"the folder {source} holds no weights (a file ending in {', '.join(SUFFIXES)})")
    if len(found) > 1:
        raise ValueError(f"the folder {source} holds several weights, name one: {listing([p.name for p in found])}")
    return found[0]


def read(path: Path) -> RawCheckpoint:
    """Everything in a file of weights.

    Raises:
        ValueError: naming the file, when it is empty, truncated, no checkpoint, or holds code.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if path.name.endswith(DATA):
        raise ValueError(f"{path} is data, not weights: chats go to data.train_path, text to data.pretrain_path")
    content: Any = read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    config = None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):  # Lightning's
        hyper_parameters = content.get("hyper_parameters")
        config = hyper_parameters.get("model_config") if isinstance(hyper_parameters, Mapping) else None
        content = _of_the_model(_canonical_names(content["state_dict"], path))
    elif isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):  # the original's half-run state
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not tensors by name")
    strangers = [f"{name} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(f"{path} is not a checkpoint: these entries are not tensors: {listing(strangers)}")
    return RawCheckpoint(_canonical_names(content, path), config)


def _of_the_model(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of a LightningModule's state that are the transformer's, without the name that it has in the module:
    `model.` in ours, `net.` or none in others'."""
    name = next((name for name in state if name.endswith(EMBEDDING)), EMBEDDING)
    prefix = name.removesuffix(EMBEDDING)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint of ours says about its run; empty for any other file.

    Returns:
        `step`, and what `module.SFTModule` keeps: `base_sha256`, `settings`, ...
    """
    content = opened(path)
    return {"step": content.get("global_step"), **content[OURS]} if of_a_run(content) else {}


def opened(path: Path) -> Any:
    """What a pickled file holds, the tensors of an archive still on disk; None where it is none or cannot be read."""
    try:
        return _read_pickle(path)
    except Exception:
        return None


def of_a_run(content: Any) -> bool:
    """Whether a file's content is a checkpoint that a run of ours can go on from."""
    return isinstance(content, Mapping) and isinstance(content.get(OURS), Mapping)


def check_of_a_run(content: Any, path: str | Path) -> None:
    """Refuse as checkpoint what holds weights alone, or the state of other code.

    Raises:
        ValueError: naming the file, and where weights are given.
    """
    if not of_a_run(content):
        raise ValueError(
            f"{path} is no checkpoint that minimind_sft wrote; to start from its weights, or to measure them, pass it "
            "as model.weights"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, whose header is checked against its size.

    Raises:
        ValueError: truncated, or a header that lies.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated: its end is missing; copy or download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(
                f"{path} holds Python code ({code.group(1)}) and not only tensors; it was refused without running it. "
                "Ask for a file that torch.load reads with weights_only=True, or for safetensors"
            ) from error
        raise ValueError(f"{path} is not a checkpoint, or is damaged") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {str(error).splitlines()[0]}") from error


def _canonical_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what DistributedDataParallel and torch.compile put into them."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.replace("_orig_mod.", "")
        while plain.startswith("module."):
            plain = plain.removeprefix("module.")
        if plain in renamed:
            raise ValueError(f"{path} holds {plain} twice, with and without a prefix")
        renamed[plain] = tensor
    return renamed


def listing(items: list[str]) -> str:
    """Items for an error message, the first of them spelled out."""
    more = f", and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more
