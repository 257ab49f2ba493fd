"""How much is forgotten at the same chat loss: the study behind docs/forgetting.md (protocol v1).

    python tests/benchmarks/study.py tests/benchmarks/study_synthetic.yaml --out runs/study
    python tests/benchmarks/study.py tests/benchmarks/study_real.yaml --config data.yaml --base 256=base.pth --out DIR

A plan names bases and trials. A trial is one `fit` with settings of its own, in one of the groups `vanilla` (nothing
holds on), `held`, or any other name (a control). Validation chats and held-out text are divided by a hash of their
parent: a third to select on, the rest to confirm on. 300 documents of the pretraining text are set apart: the base has
seen them, and no run replays them.

    l*       the lowest chat loss of a vanilla trial on the selection part, and 0.01 nats more
    rows     of each group the trial that forgets least among those that reach l*, every one at the end of its own
             learning-rate schedule; and the trial called `original`. Trials run with the plan's first seed, vanilla's,
             held's and the original's rows with all of them
    gate     no ratio where the vanilla row forgets less than 0.05 nats, or the base's chats are within 0.3 nats of l*
    figures  on the confirmation part, read once by the rows alone: `compare`, with intervals over parents within
             sources. Of several seeds the mean; the ratio's interval is over parents as well, paired.
    recovery what is still forgotten after 20 steps on pretraining text (the plan's `recovery`, which may be left out),
             against the base after the same 20 steps; of the first seed

What is whole is skipped, what was interrupted goes on. OUT/<base>.json and study.md hold the tables, OUT/<base>.csv
the losses of every document (by the SHA-256 of its line), OUT/<base>/<trial>-<seed> the runs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from study_rows import Confirmed, Outcome, chosen, findings, markdown, target_loss

from minimind_sft.budgeting import is_whole
from minimind_sft.comparison import compare
from minimind_sft.dealing import choose_by_hash, without
from minimind_sft.files import write_whole
from minimind_sft.fit_process import run_fit
from minimind_sft.readings import read_metrics
from minimind_sft.sampling import read_lines
from minimind_sft.settings import SettingsParser, find_config

SELECTION_SHARE = 3  # one parent in three
SELECTION, CONFIRMATION, SEEN, SPARE = "selection", "confirmation", "seen", "spare"
SEEN_DOCUMENTS = 300
REPEATED = ("vanilla", "held", "original")  # groups whose rows run with every seed


class Study(NamedTuple):
    """What is the same for every base.

    Attributes:
        plan: the plan's YAML.
        settings: options of every `fit`.
        data: what these settings say about the data.
        files: the parts' files, by part and setting.
        seeds: the first one selects.
        out: where everything goes.
        jobs: trials at a time.
    """

    plan: dict[str, Any]
    settings: list[str]
    data: Any
    files: dict[str, dict[str, str]]
    seeds: list[int]
    out: Path
    jobs: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--config", action="append", default=[], help="an overlay for every fit: the data")
    parser.add_argument("--base", action="append", default=[], metavar="NAME=FILE", help="instead of the plan's")
    parser.add_argument("--trials", nargs="+", metavar="NAME", help="only these of the plan's")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the plan's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each one OMP_NUM_THREADS of its own")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    plan = yaml.safe_load(options.plan.read_text(encoding="utf-8"))
    try:
        plan["trials"] = named(plan["trials"], options.trials)
    except ValueError as error:
        parser.error(f"{options.plan} has {error}")
    configs = [word for name in [*plan["configs"], *options.config] for word in ("--config", name)]
    settings, data = [*configs, *plan["fit"].split()], SettingsParser("study", "").read(find_config(configs)).data
    study = Study(
        plan, settings, data, _parts(options.out, data), options.seeds or plan["seeds"], options.out, options.jobs
    )
    bases = dict(word.split("=", 1) for word in options.base) or {
        name: _pretrained(options.out / name, base) for name, base in plan["bases"].items()
    }
    for name, weights in bases.items():
        found = _of_base(study, name, weights)
        write_whole(options.out / f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.out.glob("*.json"))}
    write_whole(options.out / "study.md", markdown(found))
    print(f"\n{markdown(found)}\nwritten {options.out / 'study.md'}")
    return 0


def named(trials: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The trials of these names, in this order; all of them where none is named.

    Raises:
        ValueError: a name that is none of theirs.
    """
    if unknown := set(names or ()) - trials.keys():
        raise ValueError(f"no trial called {', '.join(sorted(unknown))}; its trials are {'; '.join(trials)}")
    return {name: trials[name] for name in names or trials}


def _of_base(study: Study, name: str, weights: str) -> dict[str, Any]:
    """Everything about one base: all trials with the first seed, the rows with all."""
    first, *more = study.seeds
    folder = study.out / name
    with ThreadPoolExecutor(study.jobs) as pool:
        outcomes = list(pool.map(lambda trial: _run(study, folder, weights, trial, first), study.plan["trials"]))
        picked = chosen(outcomes, target_loss(outcomes))
        trials = dict.fromkeys(row.trial for group, row in picked.items() if group in REPEATED)
        repeated = [(trial, seed) for trial in trials for seed in more]
        outcomes += pool.map(lambda repeat: _run(study, folder, weights, *repeat), repeated)
        rows = {row.trial for row in picked.values()}
        base_recovered = _recovery(study, folder / "base.recovery", weights) if study.plan.get("recovery") else None
        confirmed = list(
            pool.map(
                lambda outcome: _confirm(study, folder, weights, outcome, base_recovered),
                [outcome for outcome in outcomes if outcome.trial in rows],
            )
        )
    _publish(study.out / f"{name}.csv", study.files[CONFIRMATION]["heldout_path"], confirmed)
    return findings(outcomes, {(one.trial, one.seed): one for one in confirmed})


def _publish(path: Path, text: str, confirmed: list[Confirmed]) -> None:
    """A row per document: what it is, the base's loss, and that of every confirmed run, in nats per token."""
    lines = [line.text for line in read_lines([Path(text)])]
    parents = [json.loads(line).get("parent") or line for line in lines]
    names = [f"{one.trial}, seed {one.seed}" for one in confirmed]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["document", "parent", "source", "tokens", "base", *names])
        for rows in zip(*(one.documents for one in confirmed), strict=True):
            about = rows[0]
            place = int(about["where"].rpartition(":")[2]) - 1
            losses = [f"{row['after']:.4f}" for row in rows]
            known = [_hash(lines[place]), _hash(parents[place]), about["source"], about["tokens"]]
            writer.writerow([*known, f"{about['before']:.4f}", *losses])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def part_of(line: str) -> str:
    """The part that a document or chat belongs to; pieces of one parent stay together."""
    key = json.loads(line).get("parent") or line
    number = int(hashlib.sha256(key.encode()).hexdigest(), 16)
    return CONFIRMATION if number % SELECTION_SHARE else SELECTION


def _parts(out: Path, data: Any) -> dict[str, dict[str, str]]:
    """The files of every part, written where they are not there yet."""
    files: dict[str, dict[str, str]] = {}

    def write(part: str, key: str, lines: list[str]) -> None:
        target = out / part / f"{key.removesuffix('_path')}.jsonl"
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, "".join(f"{line}\n" for line in lines))
        files.setdefault(part, {})[key] = str(target)

    for key in ("val_path", "heldout_path"):
        lines = [line.text for line in read_lines([Path(getattr(data, key))])]
        for part in (SELECTION, CONFIRMATION):
            write(part, key, [line for line in lines if part_of(line) == part])
    text = list(read_lines([Path(data.pretrain_path)]))
    seen = choose_by_hash(text, SEEN_DOCUMENTS)
    write(SEEN, "pretrain_path", [line.text for line in seen])
    write(SPARE, "pretrain_path", [line.text for line in without(text, seen)])
    return files


def _pretrained(folder: Path, base: dict[str, Any]) -> str:
    """The weights of a base, pretrained first where the plan says how."""
    if "weights" in base:
        return str(base["weights"])
    run = folder / "pretrain"
    if not is_whole(run):
        print(f"{run}", flush=True)
        run_fit([*base["pretrain"].split(), f"--run_dir={run}", "--ckpt_path=auto"], _log(run), append=True)
    return str(run / "checkpoints" / "last.ckpt")


def _run(study: Study, folder: Path, weights: str, trial: str, seed: int) -> Outcome:
    """One trial with one seed, and what it came to on the selection part."""
    of = study.plan["trials"][trial]
    run = folder / f"{re.sub('[^a-zA-Z0-9.-]+', '_', trial)}-{seed}"
    paths = study.files[SELECTION] | study.files[SPARE]
    settings = [*study.settings, f"--model.weights={weights}", *_data(paths), *of["fit"].split()]
    figures = _fit(run, [*settings, f"--data.seed={seed}"])
    times = [float(row["seconds"]) for row in read_metrics(run / "metrics.csv") if row.get("seconds")]
    steps = sorted(later - earlier for earlier, later in zip(times[:-1], times[1:], strict=True))
    return Outcome(
        trial=trial,
        group=of["group"],
        seed=seed,
        run=str(run),
        base_chat_loss=figures["before"]["chat_loss"],
        chat_loss=figures["after"]["chat_loss"],
        forgetting=figures["forgetting"],
        steps=figures["after"]["step"],
        step_seconds=steps[len(steps) // 2],
    )


def _fit(run: Path, settings: list[str]) -> dict[str, Any]:
    """A run's forgetting.json; the run is made, or gone on with, where it is not whole."""
    note = run.with_name(f"{run.name}.json")
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{run} is a run of other settings; move it away or give another --out")
    if not is_whole(run):
        print(f"{run}", flush=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(settings) + "\n")
        run_fit([*settings, f"--run_dir={run}", "--ckpt_path=auto"], _log(run), append=True)
    figures: dict[str, Any] = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    return figures


def _data(paths: dict[str, str]) -> list[str]:
    return [f"--data.{key}={path}" for key, path in paths.items()]


def _log(run: Path) -> Path:
    run.parent.mkdir(parents=True, exist_ok=True)
    return run.with_name(f"{run.name}.log")


def _confirm(study: Study, folder: Path, weights: str, outcome: Outcome, base_recovered: float | None) -> Confirmed:
    """What `compare` finds on the confirmation part and the documents set apart."""
    run, data = Path(outcome.run), study.data
    result = run.with_name(f"{run.name}.compare.json")
    documents = study.out / "documents" / f"{folder.name}-{run.name}.jsonl"
    if not documents.is_file():
        found, rows = compare(
            weights,
            str(run),
            tokenizer=data.tokenizer,
            probes=data.probes_path,
            documents=10**9,
            max_length=data.max_length,
            document_format=data.document_format,
            **(study.files[CONFIRMATION] | study.files[SEEN]),
        )
        write_whole(result, json.dumps(found, ensure_ascii=False) + "\n")
        documents.parent.mkdir(parents=True, exist_ok=True)
        write_whole(documents, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    rows = [json.loads(line) for line in documents.read_text(encoding="utf-8").splitlines()]
    recovered = None
    if base_recovered is not None and outcome.seed == study.seeds[0]:
        recovered = _recovery(study, run.with_name(f"{run.name}.recovery"), str(run)) - base_recovered
    return Confirmed(outcome.trial, outcome.seed, json.loads(result.read_text(encoding="utf-8")), rows, recovered)


def _recovery(study: Study, run: Path, weights: str) -> float:
    """Loss on the confirmation part's text after a few steps on pretraining text, in nats per token."""
    text = study.files[SPARE]["pretrain_path"]
    last = str(Path(weights) / "checkpoints" / "last.ckpt") if Path(weights).is_dir() else weights
    paths = {"train_path": text, "heldout_path": study.files[CONFIRMATION]["heldout_path"]}
    settings = [*study.settings, f"--model.weights={last}", *_data(paths), "--data.val_path=null"]
    figures = _fit(run, [*settings, "--data.pretrain_path=null", *study.plan["recovery"].split()])
    return float(figures["after"]["pretrain_loss"])


if __name__ == "__main__":
    sys.exit(main())
