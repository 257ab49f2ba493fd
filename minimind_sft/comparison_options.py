"""The command line of `compare`, and its mistakes in its own words. No torch: help and errors come at once."""

from __future__ import annotations

import argparse
from typing import NoReturn

from minimind_sft.chat import DOCUMENT_FRAMES
from minimind_sft.options import add_left_open, nearest_option, whole_from_0, whole_from_1

EXCEEDED = 3  # exit status
MAX_FORGETTING = 0.02


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        near = nearest_option(self, message)
        raise ValueError(f"{message}{f'. The nearest option is {near}' if near else '; see compare --help'}")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """The command line of `compare`."""
    parser = _Parser(
        prog="minimind_sft compare",
        allow_abbrev=False,
        formatter_class=_Help,
        description="Measure what TUNED learned and forgot over BASE. Models are .pth, .safetensors or .ckpt files, or "
        f"folders (Hugging Face's too). Exit status {EXCEEDED} when forgetting on pretraining text, in nats per token, "
        "is above --max_forgetting (the point estimate decides); 2 for a mistake.",
    )
    parser.add_argument("base", metavar="BASE", help="the model before fine-tuning")
    parser.add_argument("tuned", metavar="TUNED", help="the model after it")
    add = parser.add_argument
    add("--tokenizer", metavar="FOLDER", help="of both models; by default what lies in or beside TUNED or BASE")
    add("--heldout_path", metavar="FILE", help="text that the base has not seen; judged first")
    add("--pretrain_path", metavar="FILE", help="text that the base was pretrained on")
    add(
        "--own_documents",
        type=whole_from_0,
        default=200,
        metavar="N",
        help="without either text, documents to measure on that BASE writes itself; 0 for none",
    )
    add(
        "--own_chats",
        type=lambda text: text if text == "auto" else whole_from_0(text),
        default="auto",
        metavar="N",
        help="chats to measure on that BASE writes itself; auto: 64 where it is a chat model, 0 for none",
    )
    add("--val_path", metavar="FILE", help="validation chats")
    add("--probes", metavar="FILE", help="facts to ask, as JSON lines")
    add(
        "--pretrain_log", metavar="FILE", help="the base's loss log, CSV or JSON lines: how much of pretraining is kept"
    )
    add("--documents", type=whole_from_1, default=1000, metavar="N", help="documents of text to measure on")
    add("--max_length", type=whole_from_1, metavar="N", help="tokens; longer documents and chats are cut; by default "
        "as in the run that a model is of, else 768")  # fmt: skip
    add("--document_format", choices=list(DOCUMENT_FRAMES), help="how pretraining framed a text; by default as in the "
        "run that a model is of, else minimind3")  # fmt: skip
    add("--prompts", type=whole_from_1, default=32, metavar="N", help="validation prompts to answer")
    add("--answer_tokens", type=whole_from_1, default=256, metavar="N", help="tokens of an answer at most")
    add(
        "--max_forgetting",
        type=_limit,
        metavar="NATS",
        help=f"the most that may be forgotten; {MAX_FORGETTING} where it is not given",
    )
    add("--max_bad_ratio", type=float, default=0.01, metavar="X", help="refuse files with a larger share of bad lines")
    add("--seed", type=whole_from_0, help="of the intervals and of what is drawn; by default as in the run, else 42")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:7")
    add("--out", default="runs/compare", metavar="DIR", help="where compare.json and the pictures go")
    add("--cache_dir", metavar="DIR", help="folder of tokenized data")
    add_left_open(parser)
    return parser


def _limit(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of nats per token from 0")
    return number
