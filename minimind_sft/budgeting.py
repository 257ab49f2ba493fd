"""`python -m minimind_sft budget`: how many MB of chats for how much forgetting, measured instead of guessed.

One `fit` per cap, smallest first, each in a process of its own and in RUN_DIR/<cap>mb. With one seed a smaller cap's
sample is the beginning of a larger one's (`caps.py`), so the runs differ in the amount of data and in nothing else.
Out come a table, `budget.png` and `budget.json`. A verb that was interrupted goes on where it stopped: what is whole is
skipped, what is not is resumed. Caps that double cost less than twice the largest run together.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from minimind_sft import report
from minimind_sft.caps import RULE_OF_THUMB
from minimind_sft.files import resolve, sha256_file, write_whole
from minimind_sft.fit_process import run_fit
from minimind_sft.options import OptionParser
from minimind_sft.origins import find_origin, is_run
from minimind_sft.power_law import PowerLaw
from minimind_sft.selection import MEBIBYTE
from minimind_sft.settings import SettingsParser, find_config, named_configs
from minimind_sft.stores import Stores

OURS = {  # options of fit that this verb sets
    "--data.max_mb": "--max_mb",
    "--ckpt_path": "nothing: runs are resumed by themselves",
    "--plan": "fit --plan",
}


ALIKE = 1e-3  # nats that the base's loss may differ by from run to run


class Trial(NamedTuple):
    """One cap and what came of it; None for what the settings do not measure."""

    cap: float  # MB asked for
    mb: float  # MB taken
    step: int
    chat_loss: float | None
    forgetting: float | None  # nats per token of text, at the last step
    minutes: float
    tightest: str = "max_mb"  # what ended its sample: a cap by name, or `end`


def parser() -> OptionParser:
    """The command line of `budget`."""
    parser = OptionParser(
        "budget",
        "Train once per cap on the sample, and show chat loss, forgetting and minutes against MB. Every other option "
        "is one of fit: --config sft.yaml, --trainer.max_epochs 1. Nothing is exported unless --export asks for it.",
        weights=False,
    )
    add = parser.add_argument
    add("--max_mb", type=float, nargs="+", required=True, metavar="MB", help="the caps, two or more")
    add("--max_forgetting", type=float, default=0.02, metavar="NATS", help="what may be forgotten, per token (0.02)")
    add("--run_dir", default="runs/budget", metavar="DIR", help="where all runs go (runs/budget)")
    add("--overwrite", action="store_true", help="replace earlier runs of these caps")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: for a mistake in the command; a run that failed, with `fit`'s own words; runs of other settings in
            the folder.
    """
    options, rest = parser().parse_known_args(list(argv))
    caps = _checked(options.max_mb, options.max_forgetting, rest)
    fit_options = find_config(rest)
    if not any(word.partition("=")[0] == "--export" for word in rest):
        fit_options.append("--export=none")
    folder = Path(options.run_dir).expanduser()
    _claim(folder, caps, fit_options, overwrite=options.overwrite)
    trials = []
    for cap in caps:
        trials.append(_trial(folder, cap, fit_options))
        _check_alike(folder / f"{caps[0]:g}mb", folder / f"{cap:g}mb")
        if trials[-1].tightest != "max_mb" and cap != caps[-1]:
            print(f"{_ended(trials[-1])} at {trials[-1].mb:.3g} MB; a larger cap would be the same run", flush=True)
            break
    found = _findings(trials, options.max_forgetting, _pretrain_bytes(folder / f"{caps[0]:g}mb" / "config.yaml"))
    write_whole(folder / "budget.json", json.dumps({"command": ["budget", *argv], **found}, indent=1) + "\n")
    law = PowerLaw(**found["power_law"]) if found["power_law"] else None
    report.plot_budget(trials, law, options.max_forgetting, folder / "budget.png")
    print("\n" + _table(trials) + "\n\n" + _told(found), flush=True)
    if find_origin(folder / f"{caps[0]:g}mb").setting("data", "val_fraction"):
        print("note: by data.val_fraction every cap has other validation chats; with data.val_path, losses compare")
    print(f"\nwritten {folder / 'budget.json'} and budget.png", flush=True)
    return 0


def _checked(caps: Sequence[float], max_forgetting: float, rest: Sequence[str]) -> list[float]:
    """The caps in order."""
    for cap in caps:
        if not 0 < cap < math.inf:
            raise ValueError(f"--max_mb {cap:g}: a cap is a number of MB above 0")
    if len({f"{cap:g}" for cap in caps}) != len(caps) or len(caps) < 2:
        raise ValueError(f"--max_mb {' '.join(f'{cap:g}' for cap in caps)}: give two or more caps, each once")
    if not 0 < max_forgetting < math.inf:
        raise ValueError(f"--max_forgetting is {max_forgetting:g}; it is nats per token and must be above 0")
    for word in rest:
        if instead := OURS.get(word.partition("=")[0]):
            raise ValueError(f"{word.partition('=')[0]} belongs to one fit, and budget runs several; use {instead}")
    return sorted(caps)


def _claim(folder: Path, caps: Sequence[float], fit_options: Sequence[str], *, overwrite: bool) -> None:
    """Note the settings of each run beside its folder, so that a later call takes up only what is its own.

    Raises:
        ValueError: a folder holds a run of other settings.
    """
    settings = _fingerprint(fit_options)
    for cap in caps:
        run, note = folder / f"{cap:g}mb", folder / f"{cap:g}mb.json"
        if overwrite:
            if run.is_dir() and any(run.iterdir()) and not is_run(run):
                raise ValueError(f"{run} is no run's folder, and would be replaced; choose another --run_dir")
        elif _has_work(run) and (not note.is_file() or _read(note)["settings"] != settings):
            raise ValueError(
                f"{run} holds a run of other settings; pass --overwrite to replace it, or another --run_dir"
            )
        elif is_whole(run) and (file := _changed(run)):  # `fit` itself sees to those that go on
            raise ValueError(
                f"{run} holds a run of another {file} than there is now; pass --overwrite to replace it, or another "
                "--run_dir"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for cap in caps:
        note = folder / f"{cap:g}mb.json"
        if overwrite or not note.is_file() or _read(note)["settings"] != settings:
            _write_note(note, {"settings": settings, "minutes": 0.0, "replaces": _began(folder / f"{cap:g}mb")})


def _fingerprint(fit_options: Sequence[str]) -> list[str]:
    """The options, and hashes of the configs that they name: a YAML may be edited between two calls."""
    files = [Path(name) for _, _, name in named_configs(fit_options)]
    return [*fit_options, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file())]


def _changed(run: Path) -> str | None:
    """Of the chats and the base of a whole run, the first file that is no longer what it was."""
    known = {resolve(entry["name"]): entry["sha256"] for entry in _read(run / "sample.json").get("inputs", [])}
    origin = find_origin(run)
    if isinstance(weights := origin.setting("model", "weights"), str) and origin.base_sha256:
        known[find_origin(resolve(weights)).path] = origin.base_sha256
    for path, sha256 in known.items():
        if not path.exists() or path.is_file() and _sha256(path, path.stat().st_mtime_ns) != sha256:
            return str(path)
    return None


def _check_alike(first: Path, run: Path) -> None:
    """Refuse a run whose base had other losses than the first run's: it was measured on other documents.

    Raises:
        ValueError: naming both.
    """
    before = [_read(folder / "forgetting.json")["before"] for folder in (first, run)]
    kinds = {"pretrain_loss": "text"}
    if not find_origin(run).setting("data", "val_fraction"):  # by which every cap has other validation chats
        kinds["chat_loss"] = "chats"
    for key, kind in kinds.items():
        one, other = (reading[key] for reading in before)
        if one != other and (None in (one, other) or abs(one - other) > ALIKE):
            raise ValueError(
                f"{run} was measured on other {kind} than {first} (the base's loss is {other}, and {one}); "
                "pass --overwrite to train all caps anew, or another --run_dir"
            )


@cache
def _sha256(path: Path, changed: int) -> str:
    """Of a file that was last changed then."""
    return sha256_file(path)


def _trial(folder: Path, cap: float, fit_options: Sequence[str]) -> Trial:
    """Train with one cap, unless that is done, and read what the run left."""
    run, note_path = folder / f"{cap:g}mb", folder / f"{cap:g}mb.json"
    note, began = _read(note_path), _began(run)
    replaces = began is not None and note.get("replaces") == began  # an earlier run, by --overwrite
    if is_whole(run) and not replaces:
        print(f"{cap:g} MB: done before", flush=True)
    else:
        print(f"{cap:g} MB", flush=True)
        started = time.monotonic()
        own = [f"--data.max_mb={cap:g}", f"--run_dir={run}", "--overwrite" if replaces else "--ckpt_path=auto"]
        try:
            run_fit([*fit_options, *own], folder / f"{cap:g}mb.log", append=True)
        finally:  # a run that is resumed has the minutes of all its starts
            note["minutes"] += (time.monotonic() - started) / 60
            _write_note(note_path, note)
    figures = _read(run / "forgetting.json")
    after = figures["after"]
    sample = _read(run / "sample.json")
    taken, tightest = sample["bytes"] / MEBIBYTE, sample.get("tightest", "max_mb")
    return Trial(cap, taken, after["step"], after["chat_loss"], figures["forgetting"], note["minutes"], tightest)


def is_whole(run: Path) -> bool:
    """Whether a run came to its end: its summary is of the last step that its metrics know."""
    if not (run / "forgetting.json").is_file() or not (run / "metrics.csv").is_file():
        return False
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:  # as text: a last row may be half written
        steps = [row["step"] for row in csv.DictReader(file)]
    return bool(steps) and str(_read(run / "forgetting.json")["after"]["step"]) == steps[-1]


def _began(run: Path) -> int | None:
    """When a run's records were last written, which every start does: it tells one run from another in its place."""
    record = run / "run.json"
    return record.stat().st_mtime_ns if record.is_file() else None


def _write_note(path: Path, note: dict[str, Any]) -> None:
    write_whole(path, json.dumps(note, indent=1) + "\n")


def _has_work(run: Path) -> bool:
    """Whether there is anything to lose: a run that failed before its first checkpoint has left nothing."""
    return any((run / "checkpoints").glob("*.ckpt")) or is_whole(run)


def _ended(trial: Trial) -> str:
    """What ends at the size of a trial."""
    return "the chats end" if trial.tightest == "end" else f"data.{trial.tightest} ends the sample"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); pass --overwrite to train this cap anew") from error


def _pretrain_bytes(config: Path) -> int | None:
    """Bytes of pretraining text, by the settings that a run resolved; None where they do not tell."""
    data = SettingsParser("budget", "").read(["--config", str(config)]).data
    return Stores(**{name: getattr(data, name) for name in signature(Stores).parameters}).text.size


def choose(trials: Sequence[Trial], max_forgetting: float) -> Trial | None:
    """The largest measured cap that forgot no more than `max_forgetting`; None where none did."""
    within = [trial for trial in trials if trial.forgetting is not None and trial.forgetting <= max_forgetting]
    return max(within, key=lambda trial: trial.cap, default=None)


def _findings(trials: Sequence[Trial], max_forgetting: float, pretrain_bytes: int | None) -> dict[str, Any]:
    """What `budget.json` holds; sizes in MB of 1024 * 1024 bytes."""
    law, why_not = None, None
    try:
        law = PowerLaw.fit([(trial.mb, trial.forgetting or 0.0) for trial in trials])
    except ValueError as error:
        why_not = str(error)
    chosen = choose(trials, max_forgetting)
    return {
        "trials": [trial._asdict() for trial in trials],
        "max_forgetting": max_forgetting,
        "chosen_mb": chosen and chosen.cap,
        "taken_mb": chosen and chosen.mb,
        "power_law": law and law._asdict(),
        "no_power_law": why_not,
        "predicted_mb": law and law.reaches(max_forgetting),
        "pretrain_mb": pretrain_bytes and pretrain_bytes / MEBIBYTE,
        "rules_mb": {f"1:{n}": pretrain_bytes / n / MEBIBYTE for n in RULE_OF_THUMB} if pretrain_bytes else None,
    }


def _table(trials: Sequence[Trial]) -> str:
    rows = [
        (
            f"{trial.cap:g}",
            f"{trial.mb:.3g}",
            f"{trial.step:,}",
            "-" if trial.chat_loss is None else f"{trial.chat_loss:.4f}",
            "-" if trial.forgetting is None else f"{trial.forgetting:+.4f}",
            f"{trial.minutes:.1f}",
        )
        for trial in trials
    ]
    return report.table(("max_mb", "MB taken", "steps", "chats", "forgotten", "minutes"), rows)


def _told(found: dict[str, Any]) -> str:
    """The choice, the law and the rules of thumb, one line each."""
    law, predicted, bound = found["power_law"], found["predicted_mb"], found["max_forgetting"]
    chosen = "none of these caps" if found["chosen_mb"] is None else f"{found['chosen_mb']:g} MB"
    trial = next((Trial(**trial) for trial in found["trials"] if trial["cap"] == found["chosen_mb"]), None)
    if trial is not None and trial.tightest != "max_mb":
        chosen += f", of which {trial.mb:.3g} MB are taken: {_ended(trial)} there"
    if all(trial["forgetting"] is None for trial in found["trials"]):
        chosen = "unknown: forgetting was not measured (set data.heldout_path or data.pretrain_path)"
    rows = [(f"largest cap within {bound:g} nats", chosen)]
    if law is None:
        rows.append(("power law", f"none of forgetting by MB: {found['no_power_law']}"))
    else:
        sizes = [trial["mb"] for trial in found["trials"]]
        told = f"{law['a']:.3g} x MB^{law['b']:.2f}, exponent +- {law['b_error']:.2f} (1 s.e.)"
        if law["points"] < len(sizes):
            told += f", through the {law['points']} of {len(sizes)} caps that forgot anything"
        rows.append(("forgetting", told))
        text = "it does not rise with MB, so it predicts no cap"
        if predicted is not None:
            beyond = "" if min(sizes) <= predicted <= max(sizes) else ", outside what was measured"
            unsure = " (an exponent that may be 0 predicts little)" if law["b"] < 2 * law["b_error"] else ""
            text = f"{predicted:.3g} MB{beyond}{unsure}"
        rows.append((f"by the power law, {bound:g} nats at", text))
    rules = found["rules_mb"]
    thumb = "unknown (set data.pretrain_path or data.pretrain_mb)"
    if rules:
        sized = ", ".join(f"1 : {n:,} is {rules[f'1:{n}']:.3g} MB" for n in RULE_OF_THUMB)
        thumb = f"{sized} (of {found['pretrain_mb']:.3g} MB of pretraining text)"
    rows.append(("rules of thumb", thumb))
    return report.aligned(rows)
