"""Weights in: strict loading of any supported file.

A checkpoint is read without running any code in it (`weights_only`), its sizes are inferred from its tensors, and it
must then hold exactly the tensors of that model: anything missing, extra or misshapen is one error that lists it all.
(The original loads with ``strict=False``, so a wrong file trains from noise without a word.) What tensors cannot say
(how a width is divided into heads, eps, theta) is the family's default, and `Loaded.describe` says which was taken.

A file without ``lm_head.weight``, or with one that equals the embedding, is tied. Weights are fp32 from here on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_sft import huggingface
from minimind_sft.checkpoint_files import EMBEDDING, HEAD, find_file, listing, read
from minimind_sft.files import sha256_files
from minimind_sft.minimind import export_minimind as export_minimind
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig, stretched
from minimind_sft.model_shapes import infer_config
from minimind_sft.origins import find_origin


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, checked and ready to build.

    Attributes:
        config: the sizes found.
        state_dict: fp32 tensors under the model's own names; a tied head is absent.
        path: the file read.
        sha256: of that file.
        dtype: the type its tensors had, ``float16`` or ``float16+float32``.
        defaults: what the tensors left open, with the value taken and the key that changes it.
    """

    config: ModelConfig
    state_dict: dict[str, Tensor]
    path: Path
    sha256: str
    dtype: str
    defaults: tuple[str, ...]

    def summary(self) -> str:
        """Family, parameters, layers, heads."""
        config = self.config
        parameters = sum(tensor.numel() for tensor in self.state_dict.values())
        parts = (
            f"{config.family}{_experts(config)}",
            f"{parameters / 1e6:.2f} M parameters",
            f"{config.num_hidden_layers} layers of {config.hidden_size}",
            f"{config.num_attention_heads} heads ({config.num_key_value_heads} kv)",
            f"vocabulary {config.vocab_size}",
            f"head {'tied' if config.tie_word_embeddings else 'untied'}",
            *([f"RoPE scaling {config.rope_scaling['rope_type']}"] if config.rope_scaling else []),
        )
        return ", ".join(parts)

    def describe(self) -> str:
        """One line: the summary, type, file, hash, and the defaults taken."""
        line = f"{self.summary()}, {self.dtype}, {self.path}, sha256 {self.sha256[:12]}"
        return line + (f"; taken as default: {', '.join(self.defaults)}" if self.defaults else "")


def load(
    source: str | Path,
    *,
    family: str | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    num_experts_per_tok: int | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    inference_rope_scaling: bool = False,
) -> Loaded:
    """Read a checkpoint: a file, the only one in a folder, a Hugging Face folder, a run's best, or a name on the hub.

    Args:
        source: what `origins.find_origin` knows. A `config.json` in a Hugging Face folder, also where its weights' file
            is named, or a config in a checkpoint of ours, settles every size.
        family: ``minimind3`` or ``minimind2``; by default told by the presence of `q_norm`.
        num_attention_heads: where there is no `q_norm`, tensors do not say; MiniMind's is 8.
        num_key_value_heads: checked against the tensors, which do say once the heads are known.
        num_experts_per_tok: tensors do not say; MiniMind-3's is 1, MiniMind-2's 2.
        rope_theta: tensors do not say; MiniMind's is 1e6.
        rms_norm_eps: tensors do not say; MiniMind-3's is 1e-6, MiniMind-2's 1e-5.
        inference_rope_scaling: read 16 times further than trained, by MiniMind's YaRN.

    Raises:
        ValueError: naming the file and what is wrong with it: missing, empty, truncated, not a checkpoint, holding
            code, or tensors that are not a model's (all of them listed).
    """
    path = _meant(find_origin(source).path)
    choices = {
        "family": family,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_experts_per_tok": num_experts_per_tok,
        "rope_theta": rope_theta,
        "rms_norm_eps": rms_norm_eps,
    }
    tensors, config, defaults, files = _open(path, choices)
    if inference_rope_scaling:
        config = stretched(config)
    elif defaults:
        defaults += ("RoPE not stretched (model.inference_rope_scaling)",)
    _check(tensors, config, path)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    return Loaded(
        config=config,
        state_dict={name: tensor.float() for name, tensor in tensors.items()},
        path=path,
        sha256=sha256_files(files),
        dtype="+".join(dtypes),
        defaults=defaults,
    )


def config_of(path: Path, choices: Mapping[str, Any]) -> ModelConfig:
    """The sizes of weights, from names and shapes: files are mapped, and nothing is converted, checked or built.

    Args:
        path: as `source` of `load`.
        choices: `load`'s arguments of the same names, without `inference_rope_scaling`.
    """
    return _open(_meant(path), choices)[1]


def build(loaded: Loaded) -> Transformer:
    """A model that holds a copy of the loaded weights, on the CPU, in fp32."""
    with torch.device("meta"):
        model = Transformer(loaded.config)
    model.to_empty(device="cpu")
    model.tie_head()  # to_empty gave the two names two tensors
    problems = model.load_state_dict(loaded.state_dict, strict=False)
    assert not problems.unexpected_keys and set(problems.missing_keys) <= {HEAD}, problems
    return model


def load_model(
    source: str | Path,
    *,
    family: str | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    num_experts_per_tok: int | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    inference_rope_scaling: bool = False,
) -> tuple[Transformer, Loaded]:
    """`load`, then `build`."""
    loaded = load(
        source,
        family=family,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        num_experts_per_tok=num_experts_per_tok,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        inference_rope_scaling=inference_rope_scaling,
    )
    return build(loaded), loaded


OF_FIT = {"key": "data.tokenizer", "resize": "model.resize_vocab"}


def check_vocab(tokenizer_vocab_size: int, config: ModelConfig, *, key: str, resize: str = "") -> None:
    """Refuse a tokenizer that has ids which the model has no embedding for.

    Args:
        tokenizer_vocab_size: ids that it may give.
        config: of the model.
        key: what chose the tokenizer.
        resize: a setting that gives the model rows for new tokens, where there is one.

    Raises:
        ValueError: naming both sizes and the remedy.
    """
    if tokenizer_vocab_size > config.vocab_size:
        other = f", or set {resize} to give the new tokens rows" if resize else ""
        raise ValueError(
            f"the tokenizer has {tokenizer_vocab_size} tokens but the model's vocabulary is {config.vocab_size}; "
            f"point {key} at the tokenizer that the weights were pretrained with{other}"
        )


def _meant(path: Path) -> Path:
    """A Hugging Face folder, also where its weights' file is named, or else the one file that is meant."""
    path = huggingface.folder_of(path)
    return path if huggingface.is_folder(path) else find_file(path)


def _open(
    path: Path, choices: Mapping[str, Any]
) -> tuple[dict[str, Tensor], ModelConfig, tuple[str, ...], list[Path]]:
    """Tensors of a file or a Hugging Face folder, their config, the defaults taken, and the files they came from."""
    if huggingface.is_folder(path):
        (tensors, _), config, files = huggingface.read_folder(path)
    else:
        files, (tensors, stored) = [path], read(path)
        if stored is None:
            return tensors, *_inferred_config(tensors, path, choices), files
        config = _stored_config(stored, path)
    for name, wanted in choices.items():
        found = getattr(config, name)
        if wanted is not None and wanted != found:
            raise ValueError(f"model.{name} is {wanted}, but {path} says {found}; leave model.{name} out")
    return tensors, config, (), files


def _inferred_config(
    tensors: Mapping[str, Tensor], path: Path, choices: Mapping[str, Any]
) -> tuple[ModelConfig, tuple[str, ...]]:
    try:
        return infer_config(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            tied=HEAD not in tensors or torch.equal(tensors[HEAD], tensors.get(EMBEDDING, torch.empty(0))),
            **choices,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _stored_config(stored: Mapping[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig(**stored)
    except TypeError as error:
        names = ", ".join(field.name for field in fields(ModelConfig))
        raise ValueError(f"{path}: its model_config does not fit this version ({error}); expected {names}") from error


def _check(tensors: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """Exactly the tensors of the model, all of them numbers; else one error that lists what is wrong."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(HEAD)
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            if not (name == HEAD and config.tie_word_embeddings):
                problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} is {list(tensor.shape)}, not {list(expected[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} holds {tensor.dtype}, not floating-point numbers")
        elif not tensor.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if config.tie_word_embeddings and HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        problems.append(f"{HEAD} differs from {EMBEDDING}, though the head is tied")
    if problems:
        raise ValueError(
            f"{path} does not fit {config.family} of hidden size {config.hidden_size}: {listing(problems)}"
        )


def _experts(config: ModelConfig) -> str:
    shared = f" and {config.num_shared_experts} shared" if config.num_shared_experts else ""
    return f" MoE (top {config.num_experts_per_tok} of {config.num_experts}{shared})" if config.num_experts else ""
