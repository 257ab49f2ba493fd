"""What can be told of a run's model and data before anything is built, for `fit --plan`.

Sizes of the model come from the names and shapes of weights that are there, from a `config.json` without weights, or
from the keys under `model`. The data is known by the files' sizes and their first few hundred lines, which are
tokenized: the sample is not drawn, so numbers of documents and tokens are estimates (on the demo within 1 %).
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimind_sft import corpus, huggingface, parquet, report
from minimind_sft import weights as weight_files
from minimind_sft.chat import ChatTemplate
from minimind_sft.checkpoint_files import SUFFIXES
from minimind_sft.documents import Documents
from minimind_sft.files import Files, default_cache, resolve
from minimind_sft.mixture import Part, parts_of
from minimind_sft.model_config import ModelConfig, from_sizes, stretched
from minimind_sft.sampling import read_lines
from minimind_sft.selection import MEBIBYTE

BYTES_PER_TOKEN = 3.0  # of a line of chat, where no tokenizer can be asked; assumed
LINES_LOOKED_AT = 512
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
CHOICES = ("family", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "rope_theta", "rms_norm_eps")


class Data(NamedTuple):
    """What is known of the training data without reading all of it."""

    documents: int
    tokens: float  # of a document, in the mean
    squares: float  # likewise of its tokens squared
    told: str


def model_config(model: Mapping[str, Any], tokenizer_vocab: int | None) -> tuple[ModelConfig, str]:
    """Sizes of the model that the settings mean, and where they were found.

    Of weights that are there, names and shapes are read and nothing is copied; of a folder without weights its
    `config.json`; of weights that are not there the keys under `model`.

    Raises:
        ValueError: sizes that cannot be found out, or that `fit` would refuse.
    """
    path, family = resolve(model["weights"]), model["family"]
    if model["weights"] != "scratch" and huggingface.is_folder(path) and not _holds_weights(path):
        config, source = _folder_config(path, family), f"{path / 'config.json'}"
        config = stretched(config) if model["inference_rope_scaling"] else config
    elif model["weights"] != "scratch" and path.exists():
        config, source = weight_files.config_of(path, {name: model[name] for name in CHOICES}), f"sizes of {path}"
        for name in ("hidden_size", "num_hidden_layers"):
            if model[name] not in (None, getattr(config, name)):
                raise ValueError(
                    f"model.{name} is {model[name]}, but {path} has {getattr(config, name)}; leave it out, or plan for "
                    "other weights: model.weights may name a file that is not there yet"
                )
        config = stretched(config) if model["inference_rope_scaling"] else config
    else:
        if model["weights"] != "scratch" and not (model["hidden_size"] and model["num_hidden_layers"]):
            raise ValueError(
                f"model.weights {model['weights']} is not there to be looked at; set model.hidden_size and "
                "model.num_hidden_layers to plan for it"
            )
        constants = {name: model[name] for name in ("rope_theta", "rms_norm_eps", "inference_rope_scaling")}
        vocab_size = model["vocab_size"] or tokenizer_vocab
        config = from_sizes(family, {**{name: model[name] for name in SIZES}, "vocab_size": vocab_size}, **constants)
        source = "random weights" if model["weights"] == "scratch" else f"sizes by the keys ({path} is not there)"
        if vocab_size is None:
            source += f"; vocabulary {config.vocab_size} by default (model.vocab_size)"
    if model["resize_vocab"] and tokenizer_vocab is not None and tokenizer_vocab > config.vocab_size:
        config, source = replace(config, vocab_size=tokenizer_vocab), f"{source}; vocabulary resized"
    if tokenizer_vocab is not None:
        weight_files.check_vocab(tokenizer_vocab, config, **weight_files.OF_FIT)
    if model["reset_head"]:
        config = replace(config, tie_word_embeddings=False)
    return config, f"{config.family}, {source}"


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in SUFFIXES for path in folder.iterdir())


def _folder_config(folder: Path, family: str | None) -> ModelConfig:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        # a minimind's generation shows in its tensors' names, which a folder without weights does not have
        return huggingface.config_from_json(raw, set() if family == "minimind2" else {"q_norm.weight"})
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def template_of(folder: str) -> ChatTemplate | None:
    """The tokenizer, where it is there."""
    path = resolve(folder)
    return ChatTemplate.from_folder(path) if (path / "tokenizer.json").is_file() else None


def look_at(data: Mapping[str, Any], template: ChatTemplate | None) -> Data | None:
    """The training data by its size and its first lines; None where there is none."""
    files = Files(Path(data["cache_dir"]) if data["cache_dir"] else default_cache())
    try:
        paths, parts = parts_of(data["train_path"], partial(files.expand, key="data.train_path"), "data.train_path")
    except ValueError:
        return None
    each = max(1, LINES_LOOKED_AT // len(paths))
    lines = [line for path in paths for line in itertools.islice(read_lines([path]), each)]
    if not lines:
        return None
    size = sum(len(line.text.encode()) + 1 for line in lines) / len(lines)
    total, cap = sum(_text_bytes(path) for path in paths), _cap(data, files)
    given = _given(paths, parts)
    used = given if cap is None else min(given, cap)
    if data["max_rows"] is not None:
        used = min(used, data["max_rows"] * size)
    documents = max(1, round(used / size))
    if template is None:
        lengths = np.minimum([len(line.text.encode()) / BYTES_PER_TOKEN for line in lines], data["max_length"])
        how = f"{BYTES_PER_TOKEN:g} bytes a token assumed: no tokenizer in {data['tokenizer']}"
    else:
        lengths = _lengths(lines, data, template)
        if not len(lengths):
            return None
        documents = max(1, round(documents * len(lengths) / len(lines)))
        how = f"by the first {len(lines)} lines"
    mean = float(lengths.mean())
    if data["max_tokens"] is not None and data["max_tokens"] < documents * mean:
        used *= data["max_tokens"] / (documents * mean)
        documents = max(1, int(data["max_tokens"] / mean))
    told = (
        f"about {documents:,} documents of {mean:,.0f} tokens in the mean ({how}), "
        f"{report.megabytes(used)} of {report.megabytes(total)}"
    )
    return Data(documents, mean, float((lengths.astype(np.float64) ** 2).mean()), told)


def _given(paths: Sequence[Path], parts: Sequence[Part]) -> float:
    """Bytes that the sources' own caps leave."""
    if not parts:
        return sum(map(_text_bytes, paths))
    sizes, stream = [], iter(paths)
    for part in parts:
        size = sum(map(_text_bytes, itertools.islice(stream, part.files)))
        sizes.append(size if part.max_mb is None else min(size, part.max_mb * MEBIBYTE))
    return sum(sizes)


def _lengths(lines: Sequence[Any], data: Mapping[str, Any], template: ChatTemplate) -> np.ndarray:
    """Tokens of each line that can be learned from, after cutting."""
    with tempfile.TemporaryDirectory() as folder:
        corpus.build(
            Path(folder), lines, template=template, format=data["format"], document_format=data["document_format"]
        )
        documents = Documents(corpus.Store(Path(folder)), max_length=data["max_length"])
        return documents.sizes(np.zeros(len(documents), bool))[0]


def _text_bytes(path: Path) -> int:
    """Uncompressed bytes, without reading the file: of a .gz what its last four bytes say (of up to 4 GiB)."""
    if path.suffix == ".parquet":
        return max(parquet.estimated_bytes(path), path.stat().st_size)
    if path.suffix != ".gz" or path.stat().st_size < 4:
        return path.stat().st_size
    with open(path, "rb") as file:
        file.seek(-4, 2)
        return max(int.from_bytes(file.read(4), "little"), path.stat().st_size)


def _cap(data: Mapping[str, Any], files: Files) -> float | None:
    """Bytes that `max_mb` and `max_ratio` leave."""
    caps = [] if data["max_mb"] is None else [data["max_mb"] * MEBIBYTE]
    if data["max_ratio"] is not None and data["pretrain_mb"] is not None:
        caps.append(data["max_ratio"] * data["pretrain_mb"] * MEBIBYTE)
    elif data["max_ratio"] is not None and data["pretrain_path"] is not None:
        text = sum(_text_bytes(path) for path in files.expand(data["pretrain_path"], "data.pretrain_path"))
        caps.append(data["max_ratio"] * text)
    return min(caps, default=None)
