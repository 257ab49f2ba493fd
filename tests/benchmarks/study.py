"""How much is forgotten at the same chat loss: the study behind docs/forgetting.md (protocol v1).

    python tests/benchmarks/study.py tests/benchmarks/study_synthetic.yaml --out runs/study
    python tests/benchmarks/study.py tests/benchmarks/study_real.yaml --config data.yaml --base 256=base.pth --out DIR

A plan names bases and trials. A trial is one `fit` with settings of its own, in one of the groups `vanilla` (nothing
holds on), `held`, or any other name (a control). Validation chats and held-out text are divided by a hash of their
parent: a third to select on, the rest to confirm on.

    l*       the lowest chat loss of a vanilla trial on the selection part, and 0.01 nats more
    rows     of each group the trial that forgets least among those that reach l*, every one at the end of its own
             learning-rate schedule; and the trial called `original`
    gate     no ratio where the vanilla row forgets less than 0.05 nats, or the base's chats are within 0.3 nats of l*
    figures  on the confirmation part, read once by the rows alone: `compare`, with intervals over parents within
             sources. Of several seeds the mean; the ratio's interval is over parents as well, paired.

What is whole is skipped, what was interrupted goes on. OUT/study.json and study.md hold the tables, OUT/documents the
losses of every document, OUT/<base>/<trial>-<seed> the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from study_rows import Outcome, findings, markdown

from minimind_sft.budgeting import is_whole
from minimind_sft.comparison import compare
from minimind_sft.files import write_whole
from minimind_sft.fit_process import run_fit
from minimind_sft.readings import read_metrics
from minimind_sft.sampling import read_lines
from minimind_sft.settings import SettingsParser, find_config

SELECTION_SHARE = 3  # one parent in three
SELECTION, CONFIRMATION = "selection", "confirmation"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--config", action="append", default=[], help="an overlay for every fit: the data")
    parser.add_argument("--base", action="append", default=[], metavar="NAME=FILE", help="instead of the plan's")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the plan's")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    plan = yaml.safe_load(options.plan.read_text(encoding="utf-8"))
    configs = [word for name in [*plan["configs"], *options.config] for word in ("--config", name)]
    settings, data = [*configs, *plan["fit"].split()], SettingsParser("study", "").read(find_config(configs)).data
    parts = {
        part: {key: _part(options.out, part, key, getattr(data, key)) for key in ("val_path", "heldout_path")}
        for part in (SELECTION, CONFIRMATION)
    }
    bases = dict(word.split("=", 1) for word in options.base) or {
        name: _pretrained(options.out / name, base) for name, base in plan["bases"].items()
    }
    found = {}
    for name, weights in bases.items():
        settings_of_base = [*settings, f"--model.weights={weights}"]
        for key, path in parts[SELECTION].items():
            settings_of_base.append(f"--data.{key}={path}")
        outcomes = [
            _run(options.out / name, trial, of["group"], [*settings_of_base, *of["fit"].split()], seed)
            for trial, of in plan["trials"].items()
            for seed in options.seeds or plan["seeds"]
        ]

        def confirm(outcome: Outcome, base: str = weights) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            return _confirm(base, outcome, data, parts[CONFIRMATION], options.out)

        found[name] = findings(outcomes, confirm)
    write_whole(options.out / "study.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_whole(options.out / "study.md", markdown(found))
    print(f"\n{markdown(found)}\nwritten {options.out / 'study.json'} and study.md")
    return 0


def part_of(line: str) -> str:
    """The part that a document or chat belongs to; pieces of one parent stay together."""
    key = json.loads(line).get("parent") or line
    number = int(hashlib.sha256(key.encode()).hexdigest(), 16)
    return CONFIRMATION if number % SELECTION_SHARE else SELECTION


def _part(out: Path, part: str, key: str, path: str) -> str:
    target = out / part / f"{key.removesuffix('_path')}.jsonl"
    if not target.is_file():
        lines: Iterator[str] = (line.text for line in read_lines([Path(path)]))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, "".join(f"{line}\n" for line in lines if part_of(line) == part))
    return str(target)


def _pretrained(folder: Path, base: dict[str, Any]) -> str:
    """The weights of a base, pretrained first where the plan says how."""
    if "weights" in base:
        return str(base["weights"])
    run = folder / "pretrain"
    if not is_whole(run):
        print(f"{run}", flush=True)
        run_fit([*base["pretrain"].split(), f"--run_dir={run}", "--ckpt_path=auto"], _log(run), append=True)
    return str(run / "checkpoints" / "last.ckpt")


def _run(folder: Path, trial: str, group: str, settings: list[str], seed: int) -> Outcome:
    """One trial with one seed, unless that is done, and what it came to on the selection part."""
    run = folder / f"{re.sub('[^a-zA-Z0-9.-]+', '_', trial)}-{seed}"
    note = run.with_name(f"{run.name}.json")
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{run} is a run of other settings; move it away or give another --out")
    if not is_whole(run):
        print(f"{run}", flush=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(settings) + "\n")
        own = [f"--data.seed={seed}", f"--run_dir={run}", "--ckpt_path=auto"]
        run_fit([*settings, *own], _log(run), append=True)
    figures = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    times = [float(row["seconds"]) for row in read_metrics(run / "metrics.csv") if row.get("seconds")]
    steps = sorted(later - earlier for earlier, later in zip(times[:-1], times[1:], strict=True))
    return Outcome(
        trial=trial,
        group=group,
        seed=seed,
        run=str(run),
        base_chat_loss=figures["before"]["chat_loss"],
        chat_loss=figures["after"]["chat_loss"],
        forgetting=figures["forgetting"],
        steps=figures["after"]["step"],
        step_seconds=steps[len(steps) // 2],
    )


def _log(run: Path) -> Path:
    run.parent.mkdir(parents=True, exist_ok=True)
    return run.with_name(f"{run.name}.log")


def _confirm(
    base: str, outcome: Outcome, data: Any, paths: dict[str, str], out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `compare` finds on the confirmation part, and a row per document of its text."""
    run = Path(outcome.run)
    result = run.with_name(f"{run.name}.compare.json")
    documents = out / "documents" / f"{run.parent.name}-{run.name}.jsonl"
    if not documents.is_file():
        found, rows = compare(
            base,
            str(run),
            tokenizer=data.tokenizer,
            probes=data.probes_path,
            documents=10**9,
            max_length=data.max_length,
            document_format=data.document_format,
            **paths,
        )
        write_whole(result, json.dumps(found, ensure_ascii=False) + "\n")
        documents.parent.mkdir(parents=True, exist_ok=True)
        write_whole(documents, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    rows = [json.loads(line) for line in documents.read_text(encoding="utf-8").splitlines()]
    return json.loads(result.read_text(encoding="utf-8")), rows


if __name__ == "__main__":
    sys.exit(main())
