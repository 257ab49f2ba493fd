"""Command lines of the verbs that take weights: one line for a mistake, with the nearest option."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

LEFT_OPEN = ("num_attention_heads", "num_experts_per_tok", "rope_theta", "rms_norm_eps")


def language(asked: str | None) -> str:
    """Of the words on the screen, `en` or `zh`: as asked, else as $LANG says."""
    return asked or ("zh" if os.environ.get("LANG", "").startswith("zh") else "en")


def nearest_option(parser: argparse.ArgumentParser, message: str) -> str | None:
    """The option that an unknown one in argparse's message comes nearest to, if any does."""
    wrong = [word.split("=")[0] for word in message.split() if word.startswith("--")]
    near = [known for word in wrong for known in difflib.get_close_matches(word, parser._option_string_actions, 1)]
    return near[0] if near and "unrecognized" in message else None


class OptionParser(argparse.ArgumentParser):
    """A parser whose mistakes are `ValueError`s; for `verb WEIGHTS ...`, unless `weights` is false."""

    def __init__(self, verb: str, description: str, *, weights: bool = True) -> None:
        super().__init__(prog=f"minimind_sft {verb}", description=description, allow_abbrev=False)
        if weights:
            self.add_argument(
                "weights",
                metavar="WEIGHTS",
                help="a run directory (its best.ckpt), a .ckpt, .pth or .safetensors file, a Hugging Face folder, or "
                "hf:owner/name",
            )

    def error(self, message: str) -> NoReturn:
        near = nearest_option(self, message)
        raise ValueError(f"{message}{f'; did you mean {near}?' if near else f'; see {self.prog} --help'}")


def add_left_open(parser: argparse.ArgumentParser) -> None:
    """`LEFT_OPEN` as options, which `left_open` reads."""
    group = parser.add_argument_group("what a bare file of tensors leaves open")
    add = group.add_argument
    add("--num_attention_heads", type=whole_from_1, metavar="N", help="of minimind2 (default: 8)")
    add("--num_experts_per_tok", type=whole_from_1, metavar="N", help="of an MoE (default: the family's)")
    add("--rope_theta", type=float, metavar="X", help="of RoPE (default: 1e6)")
    add("--rms_norm_eps", type=float, metavar="X", help="of the norms (default: 1e-6 or 1e-5, the family's)")


def left_open(options: argparse.Namespace) -> dict[str, Any]:
    """What `weights.load` is told of that, by its names."""
    return {name: getattr(options, name) for name in LEFT_OPEN}


def whole_from_1(text: str) -> int:
    """A whole number of at least 1, for `type` of an option."""
    return _whole(text, 1)


def whole_from_0(text: str) -> int:
    """The same of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least}")
    return int(text)


@contextmanager
def errors_name_options() -> Iterator[None]:
    """What `fit` calls `data.val_path` is `--val_path` in a verb of its own."""
    names = "heldout_path|pretrain_path|val_path|tokenizer|max_bad_ratio|max_length|document_format|cache_dir|own_chats"
    names += "|own_documents"
    try:
        yield
    except ValueError as error:
        message = re.sub(rf"\bmodel\.({'|'.join(LEFT_OPEN)})\b", r"--\1", str(error))
        message = message.replace("data.probes_path", "--probes").replace("data.measure_documents", "--documents")
        raise ValueError(re.sub(rf"\bdata\.({names})\b", r"--\1", message)) from error
