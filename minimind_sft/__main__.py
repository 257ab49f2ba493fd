"""`python -m minimind_sft VERB ...`: verb dispatch, before any heavy import, so that `--help` answers at once."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable

HELP = """\
minimind_sft: supervised fine-tuning that does not make a small language model forget

usage: python -m minimind_sft VERB [OPTIONS]        (or: minimind-sft VERB [OPTIONS])

see what it is about
  demo       train a small base twice, plainly and holding on, and show what each forgot (under 4 minutes on 2 cores)
             python -m minimind_sft demo
train
  fit        fine-tune a base on chats, hold on to what it knew, and measure what it forgets
             python -m minimind_sft fit --config sft.yaml           (--plan: only print what it would take)
  budget     a run per cap on the sample: how many MB of chats for how much forgetting
             python -m minimind_sft budget --config sft.yaml --max_mb 0.5 1 2 4 8
look
  report     a page of what runs learned and forgot, with pictures; of runs that are still training, too
             python -m minimind_sft report runs/sft
  validate   measure a model on the validation chats and the pretraining text
             python -m minimind_sft validate --config sft.yaml --ckpt_path best
  predict    answer the validation chats, as JSON lines
             python -m minimind_sft predict --config sft.yaml --ckpt_path best
  compare    two models: what the second learned and forgot; exit status 3 when it forgot too much
             python -m minimind_sft compare base.pth tuned.pth --heldout_path text.jsonl --max_forgetting 0.02
hold on
  interpolate
             the models between a base and its fine-tune, and the one that forgot least for nearly the same chat loss
             python -m minimind_sft interpolate base.pth runs/sft out.pth --val_path val.jsonl --heldout_path text.jsonl
use
  chat       talk to a model, on a terminal or in a pipe
             python -m minimind_sft chat runs/sft
  export     files for other tools: MiniMind's own .pth, or a Hugging Face folder
             python -m minimind_sft export runs/sft my-model --format hf
data
  sample     a seeded, size-capped sample of JSON lines
             python -m minimind_sft sample chats.jsonl sample.jsonl --max_mb 72 --seed 42
  inspect    the training data as fit will see it: which tokens are learned, what is cut or rejected, what is strange
             python -m minimind_sft inspect --config sft.yaml --rows 5

`VERB --help` lists a verb's options. A config that is not in the current folder is looked for in configs/:
sft.yaml (the demo; start from it) and pretrain.yaml (a base from text). The others overlay sft.yaml, as in
--config sft.yaml --config original.yaml: original.yaml (MiniMind's settings), max_retention.yaml (the least
forgetting), minimind2_2048x20.yaml (the original 0.9 B command line)."""

TRAINING_VERBS = ("fit", "validate", "predict")
MODULES = {  # of the other verbs; each has a `main`
    "demo": "demonstration",
    "budget": "budgeting",
    "compare": "comparison",
    "chat": "terminal",
    "export": "export",
    "interpolate": "interpolation",
    "sample": "sampling",
    "inspect": "inspection",
    "report": "reporting",
}
VERBS = (*TRAINING_VERBS, *MODULES)
SHOW_TRACEBACK = "MINIMIND_SFT_TRACEBACK"
# A CPU's kernels for bf16 are kept by the number of tokens, which every micro-batch has anew, in two caches of 1,024:
# more than half a gigabyte, in pieces all over a heap that grew to 8 GB for them in 1,000 steps. 128 serve as well.
KERNELS_KEPT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
CLOSED = 141  # as a shell tells of SIGPIPE: `| head` has seen enough


def main(argv: list[str] | None = None) -> int:
    """Run a verb.

    Returns:
        The exit status: 0; 2 for a mistake in the command, the settings or the data; 3 where `compare` finds that too
        much was forgotten; 141 where nobody reads the output to its end.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        from minimind_sft import __version__

        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; verbs are {', '.join(VERBS)}"
        print(f"minimind_sft: error: {verb!r} is not a verb{hint}", file=sys.stderr)
        return 2
    for name, kernels in KERNELS_KEPT.items():  # read when first needed, and by processes of ours
        os.environ.setdefault(name, kernels)
    if not {"", os.getcwd()} & set(sys.path):  # the script, unlike python -m, does not look for model.terms here
        sys.path.append(os.getcwd())
    try:
        status = _verb(verb)(rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        from minimind_sft.report import no_more_output

        no_more_output()
        if verb in TRAINING_VERBS and "--plan" not in rest:
            print(f"minimind_sft: error: the output was closed, and {verb} with it", file=sys.stderr)
        return CLOSED
    except (ValueError, OSError) as error:
        if os.environ.get(SHOW_TRACEBACK):
            raise
        print(f"minimind_sft: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minimind_sft: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(SHOW_TRACEBACK):
            raise
        print(_unexpected(error), file=sys.stderr)
        return 1


def _verb(name: str) -> Callable[[list[str]], int]:
    """The function that runs a verb; what it needs is imported here and no earlier."""
    if name in MODULES:
        main: Callable[[list[str]], int] = importlib.import_module(f"minimind_sft.{MODULES[name]}").main
        return main
    from minimind_sft import cli

    return functools.partial(cli.run, name)


def _unexpected(error: Exception) -> str:
    """One line about what is no mistake of the user's; where it comes from goes to a file, for a run may take days."""
    import tempfile
    import traceback

    said = " ".join(str(error).split())[:500]
    try:
        with tempfile.NamedTemporaryFile("w", prefix="minimind_sft-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        where = f"where it comes from is in {file.name}"
    except OSError:
        where = f"set {SHOW_TRACEBACK}=1 to see where it comes from"
    return f"minimind_sft: unexpected {type(error).__name__}: {said}; {where}"


if __name__ == "__main__":
    sys.exit(main())
