"""`python -m minimind_sft VERB ...`: verb dispatch, before any heavy import, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys

HELP = """\
minimind_sft: supervised fine-tuning that does not make a small language model forget

usage: python -m minimind_sft VERB [OPTIONS]        (or: minimind-sft VERB [OPTIONS])

train
  fit        fine-tune a base on chats, and measure what it forgets
             python -m minimind_sft fit --config sft.yaml           (--plan: only print what it would take)
look
  validate   measure a model on the validation chats and the pretraining text
             python -m minimind_sft validate --config sft.yaml --ckpt_path best
  predict    answer the validation chats, as JSON lines
             python -m minimind_sft predict --config sft.yaml --ckpt_path best
data
  sample     a seeded, size-capped sample of JSON lines
             python -m minimind_sft sample chats.jsonl sample.jsonl --max_mb 72 --seed 42
  inspect    the training data as fit will see it: which tokens are learned, what is cut or rejected, what is strange
             python -m minimind_sft inspect --config sft.yaml --rows 5

`VERB --help` lists a verb's options. A config that is not in the current folder is looked for in configs/:
sft.yaml (the demo; start from it), original.yaml (MiniMind's settings), pretrain.yaml (a base from text),
minimind2_2048x20.yaml (the original 0.9 B command line)."""

TRAINING_VERBS = ("fit", "validate", "predict")
VERBS = (*TRAINING_VERBS, "sample", "inspect")
SHOW_TRACEBACK = "MINIMIND_SFT_TRACEBACK"


def main(argv: list[str] | None = None) -> int:
    """Run a verb.

    Returns:
        The exit status: 0, or 2 for a mistake in the command, the settings or the data.
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
    try:
        if verb == "sample":
            from minimind_sft.sampling import main as sample

            return sample(rest)
        if verb == "inspect":
            from minimind_sft.inspection import main as look

            return look(rest)
        from minimind_sft.cli import run

        return run(verb, rest)
    except ValueError as error:
        if os.environ.get(SHOW_TRACEBACK):
            raise
        print(f"minimind_sft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minimind_sft: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
