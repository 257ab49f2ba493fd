"""`python -m minimind_sft interpolate BASE TUNED OUT`: the models between a base and its fine-tune, and the best one.

    w(alpha) = w_base + alpha (w_tuned - w_base)

Along this line forgetting falls faster than the chat loss rises, so a model part of the way back often keeps most of
what was learned for a fraction of what was forgotten, at no cost in training (WiSE-FT, arXiv 2109.01903). Rows of
control tokens in the embedding and the output layer stay at alpha 1: pretraining may never have trained them, and a
chat does not work with half a turn marker.

The smallest alpha whose chat loss is within `--tolerance` nats of the fine-tune's is written. Every alpha costs one
look at the chats and the text; without text, the base writes some first.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minimind_sft import export, huggingface, huggingface_config, measures, minimind, report, weights
from minimind_sft.chat import DOCUMENT_FRAMES, ChatTemplate
from minimind_sft.corpus import Store
from minimind_sft.files import resolve, write_whole
from minimind_sft.model import Transformer
from minimind_sft.options import OptionParser, add_left_open, errors_name_options, left_open, whole_from_0, whole_from_1
from minimind_sft.origins import Origin, find_origin
from minimind_sft.pairs import SEEN_IS_REPLAYED, Pair, fed_as, find_tokenizer, open_pair
from minimind_sft.sampling import Line, read_lines
from minimind_sft.significance import Interval
from minimind_sft.stores import Stores
from minimind_sft.strict_json import finite

ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TOLERANCE = 0.02


class Point(NamedTuple):
    """One model of the line."""

    alpha: float
    chat_loss: float  # nats per supervised token
    forgetting: float  # nats per token of text above the base
    interval: Interval | None  # of forgetting, 95 %


def parser() -> OptionParser:
    """The command line of `interpolate`."""
    parser = OptionParser(
        "interpolate",
        "Measure the models between BASE and TUNED, and write the one nearest to the base whose chat loss is within "
        "--tolerance of TUNED's.",
        weights=False,
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="the model before fine-tuning")
    add("tuned", metavar="TUNED", help="the model after it, or its run directory")
    add("out", metavar="OUT", help="what to write: a name that ends in .pth for MiniMind's format, else a Hugging Face "
        "folder; OUT.json and OUT.png, the curve, come beside it")  # fmt: skip
    add("--val_path", metavar="FILE", required=True, help="validation chats")
    add("--heldout_path", metavar="FILE", help="text that the base has not seen")
    add("--pretrain_path", metavar="FILE", help="text of its pretraining, where there is no --heldout_path")
    add("--tokenizer", metavar="FOLDER", help="of both models; by default what lies in or beside TUNED or BASE")
    add("--alphas", type=float, nargs="+", default=list(ALPHAS), metavar="A", help="where to measure, from 0 "
        "(the base, but for control tokens, which stay the fine-tune's) to 1")  # fmt: skip
    add("--tolerance", type=float, default=TOLERANCE, metavar="NATS", help="chat loss that may be given up (0.02)")
    add("--documents", type=whole_from_1, default=1000, metavar="N", help="documents of text to measure on (1000)")
    add("--own_documents", type=whole_from_0, default=200, metavar="N", help="documents that the base writes, where no "
        "text is given (200)")  # fmt: skip
    add("--max_length", type=whole_from_1, metavar="N", help="tokens; longer documents are cut (as in TUNED's run, "
        "else 768)")  # fmt: skip
    add("--document_format", choices=list(DOCUMENT_FRAMES), help="how pretraining framed a text (as in TUNED's run, "
        "else minimind3)")  # fmt: skip
    add("--max_bad_ratio", type=float, default=0.01, metavar="RATIO", help="refuse data with more bad lines (0.01)")
    add("--seed", type=whole_from_0, help="of the intervals and of what is drawn (as in TUNED's run, else 42)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:7")
    add("--cache_dir", metavar="DIR", help="folder of tokenized data")
    add("--overwrite", action="store_true", help="replace what is at OUT")
    add_left_open(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: for a mistake in the command, the models or the data.
    """
    options = parser().parse_args(list(argv))
    alphas = sorted({*options.alphas, 1.0})
    if not all(0.0 <= alpha <= 1.0 for alpha in alphas):
        raise ValueError(f"--alphas {options.alphas}: an alpha is from 0 (the base) to 1 (the fine-tune)")
    if not options.tolerance >= 0.0:
        raise ValueError(f"--tolerance is {options.tolerance}; it is in nats, 0 or above")
    if not (options.heldout_path or options.pretrain_path or options.own_documents):
        raise ValueError(
            "forgetting is measured on text: give --heldout_path, --pretrain_path, or --own_documents of the base"
        )
    with errors_name_options():
        _run(options, alphas, argv)
    return 0


def _run(options: argparse.Namespace, alphas: Sequence[float], argv: Sequence[str]) -> None:
    has_text = bool(options.heldout_path or options.pretrain_path)
    out = Path(options.out).expanduser()
    curve_files = [out.with_name(f"{out.name}{ending}") for ending in (".json", ".png")]
    if not options.overwrite and (there := [str(path) for path in (out, *curve_files) if path.exists()]):
        raise ValueError(f"already there: {', '.join(there)}; pass --overwrite to replace, or another name")
    origin = find_origin(resolve(options.tuned))
    tokenizer = origin.tokenizer() if origin.run_dir and not options.tokenizer else find_tokenizer(
        options.base, options.tuned, options.tokenizer
    )  # fmt: skip
    template = ChatTemplate.from_folder(tokenizer)
    fed = fed_as(
        options.base,
        options.tuned,
        max_length=options.max_length,
        document_format=options.document_format,
        seed=options.seed,
    )
    pair = open_pair(
        options.base,
        str(origin.path),
        template,
        left_open=left_open(options),
        device=options.device,
        fed=fed,
    )
    _check_out(pair.tuned, out, overwrite=options.overwrite)
    stores = Stores(
        train_path=[],
        tokenizer=str(tokenizer),
        val_path=options.val_path,
        heldout_path=options.heldout_path,
        pretrain_path=None if options.heldout_path else options.pretrain_path,
        measure_documents=options.documents if options.heldout_path else origin.unreplayed(options.documents),
        **fed.of_stores,
        max_bad_ratio=options.max_bad_ratio,
        cache_dir=options.cache_dir,
    )
    own = None if has_text else pair.own_text(stores.cache, options.own_documents)
    points = curve(pair, stores, alphas, own=own, halve=origin.halves)
    best = choose(points, options.tolerance)
    model = interpolate(pair.base, pair.tuned, best.alpha, template.control_ids)
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": ["interpolate", *argv],
        **pair.about,
        "tolerance": options.tolerance,
        "chosen": best.alpha,
        "points": [point._asdict() for point in points],
    }
    write_whole(curve_files[0], json.dumps(finite(record), indent=1, ensure_ascii=False) + "\n")
    report.plot_interpolation(points, best, curve_files[1])
    _write(model, out, best, pair, origin, tokenizer, options)
    print(_table(points, best))
    notes = [] if alphas[0] > 0 else [report.likely_swapped(points[0].chat_loss, points[-1].chat_loss)]
    if options.pretrain_path and not options.heldout_path and origin.replays_all:
        notes.append(SEEN_IS_REPLAYED)
    for told in filter(None, notes):
        print(f"\nnote: {told}")
    print(f"\nwritten {out} (alpha {best.alpha:g}), {out.name}.json and {out.name}.png", flush=True)


@torch.no_grad()
def interpolate(base: Transformer, tuned: Transformer, alpha: float, control_ids: Sequence[int]) -> Transformer:
    """The model at `alpha` between two of one shape; control tokens' rows are the tuned model's.

    Raises:
        ValueError: models of different shapes.
    """
    old, new = (dict(model.named_parameters()) for model in (base, tuned))
    unlike = [name for name in old.keys() | new.keys() if name not in old or name not in new
              or old[name].shape != new[name].shape]  # fmt: skip
    if unlike:
        raise ValueError(f"BASE and TUNED differ in shape ({', '.join(sorted(unlike)[:5])}): no line joins them")
    model = copy.deepcopy(tuned)  # a new one would be filled with random numbers first
    rows = list(control_ids)
    for name, parameter in model.named_parameters():
        torch.lerp(old[name], new[name], alpha, out=parameter.data)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            parameter[rows] = new[name][rows]
    return model.eval()


def curve(
    pair: Pair,
    stores: Stores,
    alphas: Sequence[float],
    *,
    own: tuple[Store, Iterator[Line]] | None = None,
    halve: bool = False,
    tell: bool = True,
) -> list[Point]:
    """Chat loss and forgetting at every alpha; told as they come, unless `tell` is false.

    Args:
        pair: the two ends of the line.
        stores: of validation chats and text.
        alphas: where to measure.
        own: text by the base and its lines, in place of the stores'.
        halve: as for `Stores.open`.
        tell: whether to print every point.
    """
    opened = stores.open(train=False, halve=halve)
    assert opened.validation is not None
    if own is None:
        assert opened.measured is not None
        own = opened.measured, read_lines([Path(file) for file in opened.measured.meta["files"]])
    text, lines = own
    chats, documents = pair.chats(opened.validation), pair.text(text)
    measures.require_some(chats, "validation chats")
    measures.require_some(documents, "pretraining text")
    draws = measures.resampling(measures.origins(text, documents.index, lines), pair.seed)
    tokens, before = pair.losses(pair.base, documents, "the base's loss on text")
    points = []
    for alpha in alphas:
        model = interpolate(pair.base, pair.tuned, alpha, pair.template.control_ids)
        targets, chat_nats = pair.losses(model, chats, f"chats, alpha {alpha:g}")
        rise = pair.losses(model, documents, f"text, alpha {alpha:g}")[1] - before
        chat_loss, forgetting = float(chat_nats.sum() / targets.sum()), float(rise.sum() / tokens.sum())
        points.append(Point(alpha, chat_loss, forgetting, draws.ratio(rise, tokens)))
        if tell:
            print(f"alpha {alpha:<5g} chats {chat_loss:.4f}  forgotten {forgetting:+.4f}", flush=True)
    return points


def choose(points: Sequence[Point], tolerance: float) -> Point:
    """The point of the smallest alpha within `tolerance` of the chat loss at alpha 1.

    Raises:
        ValueError: a fine-tune without a chat loss.
    """
    tuned = max(points, key=lambda point: point.alpha).chat_loss
    if not math.isfinite(tuned):
        raise ValueError(
            f"the chat loss of TUNED is {tuned}: the fine-tune is broken, and no part of the way to it is of use; take "
            "a checkpoint from before it broke"
        )
    return min((point for point in points if point.chat_loss <= tuned + tolerance), key=lambda point: point.alpha)


def _check_out(model: Transformer, out: Path, *, overwrite: bool) -> None:
    """Refuse what cannot be written, before minutes are spent on measuring."""
    if out.suffix == ".pth":
        minimind.check_holds(model.config, out)
        return
    huggingface.check_target(out, overwrite=overwrite)
    huggingface_config.config_to_json(model.config)


def _write(
    model: Transformer,
    out: Path,
    best: Point,
    pair: Pair,
    origin: Origin,
    tokenizer: Path,
    options: argparse.Namespace,
) -> None:
    if out.suffix == ".pth":
        minimind.export_minimind(model, out)
        return
    loaded = weights.load(origin.path, **left_open(options))
    title = f"{out.name}: {best.alpha:g} of the way from its base to {origin.path.name}"
    made = (
        f"Base + {best.alpha:g} (fine-tune - base), weight by weight, but for the rows of control tokens, which are "
        f"the fine-tune's; base SHA-256 `{pair.about['base']['sha256']}`, fine-tune SHA-256 "
        f"`{pair.about['tuned']['sha256']}`. Measured: {best.chat_loss:.4f} nats per token on validation chats, "
        f"{best.forgetting:+.4f} on text against the base."
    )
    export.write_hf(model, loaded, origin, out, tokenizer, title=title, made=made, overwrite=options.overwrite)


def _table(points: Sequence[Point], best: Point) -> str:
    rows = []
    for point in points:
        interval = "" if point.interval is None else f"{point.interval[0]:+.4f} to {point.interval[1]:+.4f}"
        chosen = "chosen" if point is best else ""
        rows.append((f"{point.alpha:g}", f"{point.chat_loss:.4f}", f"{point.forgetting:+.4f}", interval, chosen))
    return report.table(("alpha", "chats", "forgotten", "95 %", ""), rows)
