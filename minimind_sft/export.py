"""`python -m minimind_sft export WEIGHTS OUT --format minimind|hf`: weights in, files that other tools open out.

    minimind   OUT/<name>_<hidden size>[_moe].pth: fp16, for the original's `eval_llm.py` and its forks
    hf         the folder OUT: for transformers, vLLM, llama.cpp (GGUF), Ollama; with tokenizer and model card

Everything is written under another name and moved, and what is there stays unless `--overwrite` says otherwise. At the
end of `fit` the same is done for `best.ckpt` and `last.ckpt`, in both formats: 12 bytes per parameter in all, as much
as one more checkpoint, whose room the disk had to have anyway; 0.3 s for the demo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minimind_sft.hub import PREFIX
from minimind_sft.options import OptionParser, add_left_open, errors_name_options, left_open
from minimind_sft.origins import BEST, LAST, Origin, find_origin

if TYPE_CHECKING:
    from minimind_sft.model import Transformer
    from minimind_sft.weights import Loaded

FORMATS = ("minimind", "hf")
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> OptionParser:
    """The command line of `export`."""
    parser = OptionParser("export", "Write a model's files for other tools.")
    parser.add_argument("out", metavar="OUT", help="the folder to write into (minimind) or to make (hf)")
    parser.add_argument(
        "--format", choices=FORMATS, required=True, help="minimind: OUT/NAME_768.pth, fp16; hf: the folder OUT"
    )
    parser.add_argument("--name", help="of the file (minimind) or on the card (hf); by default the run's or file's")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="for hf, where the weights' folder or run does not tell")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights, for hf (default: float32, exact)")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    add_left_open(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: weights that cannot be read, or that the format cannot hold; something there already.
    """
    options = parser().parse_args(list(argv))
    if options.format == "minimind" and (options.dtype or options.tokenizer):
        raise ValueError("--dtype and --tokenizer are for --format hf: MiniMind's file is fp16, without a tokenizer")
    origin = find_origin(options.weights)
    name = options.name or default_name(options.weights, origin)
    if not re.fullmatch(r"[^/\\\x00-\x1f]+", name) or name.startswith("."):
        raise ValueError(f"--name {name!r} cannot be part of a file's name; use letters, digits, - and _")
    tokenizer = origin.tokenizer(options.tokenizer) if options.format == "hf" else None
    out = Path(options.out).expanduser()

    from minimind_sft import huggingface, minimind, weights

    if out.is_file():
        raise ValueError(f"{out} is a file, but a folder is to be written; name another")
    if options.format == "hf":
        huggingface.check_target(out, overwrite=options.overwrite)  # before minutes are spent on reading
    with errors_name_options():
        loaded = weights.load(origin.path, **left_open(options))
    print(loaded.describe(), flush=True)
    model = weights.build(loaded)
    if tokenizer is not None:
        write_hf(model, loaded, origin, out, tokenizer, title=name, dtype=options.dtype, overwrite=options.overwrite)
        print(f"written {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    else:
        target = out / minimind.file_name(name, loaded.config)
        if target.exists() and not options.overwrite:
            raise ValueError(f"{target} exists; pass --overwrite to replace it, or another --name")
        minimind.export_minimind(model, target)
        print(f"written {target}{minimind.untold(loaded.config)}")
    return 0


def default_name(source: str, origin: Origin) -> str:
    """The run's name, the one on the hub, or the file's or folder's without the sizes that MiniMind puts there."""
    if origin.run_dir is not None and origin.path.suffix == ".ckpt":
        return origin.run_dir.resolve().name
    if source.startswith(PREFIX):
        return source.partition("@")[0].rpartition("/")[2]
    path = origin.path.absolute()
    return re.sub(r"_\d+(_moe)?$", "", path.name if path.is_dir() else path.stem)


def write_hf(
    model: Transformer,
    loaded: Loaded,
    origin: Origin,
    folder: Path,
    tokenizer: Path,
    *,
    title: str,
    made: str = "",
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """A Hugging Face folder with tokenizer and model card, see `card.model_card`.

    Raises:
        ValueError: as `huggingface.export_hf`; or a tokenizer that does not fit, or has no chat template.
    """
    import torch

    from minimind_sft import huggingface, weights
    from minimind_sft.card import model_card
    from minimind_sft.chat import ChatTemplate

    template = ChatTemplate.from_folder(tokenizer)
    weights.check_vocab(template.vocab_size, loaded.config, key="--tokenizer")
    huggingface.export_hf(
        model,
        folder,
        tokenizer=tokenizer,
        card=model_card(title, loaded, origin, made=made),
        dtype=getattr(torch, dtype or DTYPES[0]),
        stop_ids=template.stop_ids,
        overwrite=overwrite,
    )


def export_run(run_dir: Path, formats: Sequence[str]) -> list[str]:
    """The best and the last checkpoint of a run, into its `export/`; an earlier export is replaced.

    A format that cannot hold the model, or a full disk, is told and no reason to fail: the checkpoints are whole.

    Returns:
        What to tell: one line per checkpoint written, and one per thing that could not be.
    """
    from minimind_sft import minimind, weights

    told = []
    for checkpoint in (BEST, LAST):
        path = run_dir / "checkpoints" / checkpoint
        if not path.is_file() or not formats:
            continue
        origin, name, written = Origin(path, run_dir), path.stem, []
        try:
            loaded = weights.load(path)
            model = weights.build(loaded)
        except ValueError as error:
            told.append(f"not exported: {error}")
            continue
        for format in formats:
            try:
                if format == "minimind":
                    target = run_dir / "export" / minimind.file_name(name, loaded.config)
                    minimind.export_minimind(model, target)
                    more = minimind.untold(loaded.config)
                else:
                    target, more = run_dir / "export" / name, ""
                    title = f"{run_dir.resolve().name}, {name}"
                    write_hf(model, loaded, origin, target, origin.tokenizer(), title=title, overwrite=True)
                written.append(f"{target}{more}")
            except (ValueError, OSError) as error:
                told.append(f"not exported: {error}")
        if written:
            told.append(f"exported {checkpoint} as {' and '.join(written)}")
    return told
