"""Hugging Face folders, in and out: `config.json` beside safetensors, for the families whose layers are ours.

Read are `minimind`, `qwen3`, `qwen3_moe`, `qwen2` and `llama`, in one file or in shards, without transformers
(importing it costs 3 s). Whatever in `config.json` would change the arithmetic and is not implemented (a sliding
window, another activation, an unknown RoPE scaling) is an error that names it.
Written are folders that `AutoModelForCausalLM` opens: MiniMind-3 is Qwen3 or Qwen3Moe, MiniMind-2 is Llama.
Parameter names are the same on both sides, so only the description of the sizes is translated.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minimind_sft.checkpoint_files import RawCheckpoint, find_file, listing, read, read_safetensors
from minimind_sft.files import sync, sync_folder
from minimind_sft.huggingface_config import config_from_json, config_to_json
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # where they are not in shards; the first that is there
WRITTEN = ("config.json", "generation_config.json", "model.safetensors", "README.md", *TOKENIZER_FILES)


def is_folder(source: Path) -> bool:
    """Whether this is a Hugging Face folder."""
    return (source / "config.json").is_file()


def folder_of(source: Path) -> Path:
    """The Hugging Face folder whose weights this file is, which tells what they leave open; else the file itself."""
    return source.parent if source.name in WEIGHTS and is_folder(source.parent) else source


def read_folder(folder: Path) -> tuple[RawCheckpoint, ModelConfig, list[Path]]:
    """Tensors, sizes, and the files that the tensors came from.

    Raises:
        ValueError: naming the file, when one is missing, damaged, or asks for something that is not implemented.
    """
    path = folder / "config.json"
    config = _read_json(path)
    if (folder / INDEX).is_file():
        shards = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
        if missing or not shards:
            raise ValueError(f"{folder / INDEX} names shards that are not there: {listing(missing)}")
        files = [folder / name for name in shards]
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= read_safetensors(file)
    else:
        usual = [file for name in WEIGHTS if (file := folder / name).is_file()]
        files = usual[:1] or [find_file(folder)]
        tensors = read(files[0]).tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    try:
        return RawCheckpoint(tensors, None), config_from_json(config, set(tensors)), files
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def export_hf(
    model: Transformer,
    folder: str | Path,
    *,
    tokenizer: str | Path | None,
    card: str,
    dtype: torch.dtype = torch.float32,
    stop_ids: Collection[int] = (),
    overwrite: bool = False,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` open. It appears only when complete.

    Args:
        model: any device, any type.
        folder: where to.
        tokenizer: folder of the tokenizer, whose files are copied; None for none.
        card: the README.md.
        dtype: of the weights; fp32 keeps our logits to the last digit.
        stop_ids: where an answer ends, where that is not the tokenizer's end token alone.
        overwrite: replace the folder if it is such an export.

    Raises:
        ValueError: the folder exists, the model has no class in transformers, or weights do not fit the type.
    """
    folder = Path(os.path.abspath(folder))
    check_target(folder, overwrite=overwrite)
    special: dict[str, Any] = _special_ids(Path(tokenizer)) if tokenizer else {}
    content = {**config_to_json(model.config), **special, "torch_dtype": str(dtype).removeprefix("torch.")}
    if stop_ids:
        first, *more = stop_ids
        ends = [first, *more] if more else first
        special["eos_token_id"] = ends
        content.setdefault("eos_token_id", ends)
    state = _state(model, dtype, folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        _write_json(temporary / "config.json", content)
        # safetensors writes for the owner alone
        (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode)
        _write_json(temporary / "generation_config.json", special)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for name in TOKENIZER_FILES if tokenizer else ():
            if (Path(tokenizer or "") / name).is_file():
                shutil.copyfile(Path(tokenizer or "") / name, temporary / name)
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it is an export that may be replaced, with nothing else in it.

    Raises:
        ValueError: naming what is in the way.
    """
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, but a folder is to be written; name another")
    if not overwrite:
        raise ValueError(f"{folder} exists; pass --overwrite to replace it")
    others = sorted(path.name for path in folder.iterdir() if path.name not in WRITTEN)
    if others or not is_folder(folder):
        raise ValueError(
            f"{folder} is not an export, or holds more than one (such as {listing(others) or 'no config.json'}); "
            "--overwrite replaces whole exports only: name another folder, or empty this one"
        )


def _move(temporary: Path, folder: Path) -> None:
    """Give a complete folder its name; what has it now is put aside first and removed last."""
    for path in temporary.iterdir():
        sync(path)
    sync_folder(temporary)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    sync_folder(folder.parent)


def _state(model: Transformer, dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    """What goes into the file: a tied head is named in `config.json`, not stored."""
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    overflown = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if overflown:
        raise ValueError(f"cannot export to {folder}: not finite in {dtype}: {listing(overflown)}")
    return state


def _special_ids(tokenizer: Path) -> dict[str, int]:
    """Ids of the tokens that begin, end and pad, as far as the tokenizer's own files name them."""
    ids = {token["content"]: token["id"] for token in _read_json(tokenizer / "tokenizer.json").get("added_tokens", [])}
    described = tokenizer / "tokenizer_config.json"
    named = _read_json(described) if described.is_file() else {}
    found = {}
    for key in ("bos", "eos", "pad"):
        token = named.get(f"{key}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if text in ids:
            found[f"{key}_token_id"] = ids[text]
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
