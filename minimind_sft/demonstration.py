"""`python -m minimind_sft demo`: the demo's base trained twice, as the original does and holding on, side by side.

Both runs are plain `fit`s of two and a quarter epochs with the shipped settings (`original.yaml` over `sft.yaml`, and
`sft.yaml` alone), each in a process of its own. On a CPU they run side by side, each on half of the cores: a model
this small does not speed up much with more, and both take their time under the same conditions. Then one table, the
facts that were lost by name, and one picture: chat loss against forgetting. Under 4 minutes on 2 cores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from minimind_sft.demonstration_words import NEXT, WORDS
from minimind_sft.files import PROJECT, write_whole
from minimind_sft.fit_process import run_fit
from minimind_sft.options import OptionParser, language

NAME = "Minnow"  # what the model calls itself in the shipped chats
KINDS = ("original", "held")
ALPHAS = (0.0, 0.5, 0.75)  # the held run's own last reading is 1
STEPS = {"original": 74, "held": 297}  # two and a quarter epochs, the original's steps four times as long
LOOKS = {"original": 10, "held": 110}  # steps between them
NAMED = 8  # lost facts spelled out
DATA = PROJECT / "data"


class Run(NamedTuple):
    """What one of the two runs left."""

    kind: str
    seconds: float
    path: list[tuple[float, float]]  # (chat loss, forgetting), from step 0 on
    text_loss: float
    probes: dict[str, Any]


def parser() -> OptionParser:
    """The command line of `demo`."""
    parser = OptionParser(
        "demo", "Train the demo's base twice, plainly and holding on, and show what each forgot.", weights=False
    )
    add = parser.add_argument
    add("--name", default=NAME, help=f"what the model shall call itself ({NAME})")
    add("--lang", choices=sorted(WORDS), help="of the words on the screen; by default as $LANG says")
    add("--run_dir", default="runs/demo", metavar="DIR", help="where both runs go (runs/demo)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:7")
    steps = ", ".join(f"{kind} {count}" for kind, count in STEPS.items())
    add("--max_steps", type=int, metavar="N", help="end both runs after so many steps (by default after two and a "
        f"quarter epochs, {steps})")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier demo")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        The exit status: 0, or that of a run that failed.

    Raises:
        ValueError: for a mistake in the command; an earlier demo in the folder.
    """
    options = parser().parse_args(list(argv))
    name = " ".join(options.name.split())
    if not name or len(name) > 40:
        raise ValueError(f"--name {options.name!r} must have 1 to 40 characters")
    words = WORDS[language(options.lang)]
    folder = Path(options.run_dir).expanduser()
    done = [kind for kind in KINDS if (folder / kind).exists()]
    if done and not options.overwrite:
        raise ValueError(f"{folder} holds an earlier demo ({', '.join(done)}); pass --overwrite, or another --run_dir")
    _rename(name, folder / "chats")
    runs = _train(folder, options.device, options.max_steps, words)
    between = [*_interpolated(folder, options.device), runs[-1].path[-1]]
    print("\n" + _table(runs, words), flush=True)
    for run in runs:
        print("\n" + _lost(run, words), flush=True)
    picture = folder / "demo.png"
    _plot(runs, between, picture)
    print("\n" + words["picture"].format(picture=picture) + "\n" + words["next"] + "\n\n" + NEXT, flush=True)
    return 0


def _rename(name: str, folder: Path) -> None:
    """The shipped chats, with another name for the model."""
    folder.mkdir(parents=True, exist_ok=True)
    said = json.dumps(name, ensure_ascii=False)[1:-1]
    for file in ("sft_train.jsonl", "sft_val.jsonl"):
        write_whole(folder / file, (DATA / file).read_text(encoding="utf-8").replace(NAME, said))


def _train(folder: Path, device: str, max_steps: int | None, words: dict[str, str]) -> list[Run]:
    """Both runs: side by side on a CPU of two cores or more, else one after the other."""
    from minimind_sft.devices import one_device
    from minimind_sft.workers import available_cores

    cores = available_cores()
    together = len(KINDS) if one_device(device).type == "cpu" and cores >= len(KINDS) else 1
    print("\n".join([words["together"]] * (together > 1) + [words[f"run_{kind}"] for kind in KINDS]), flush=True)

    def run(kind: str) -> Run:
        steps = STEPS[kind] if max_steps is None else max_steps
        seconds = _fit(kind, folder, device, steps, f"{words[kind]:<9}", cores // together)
        return _read(kind, folder / kind, seconds)

    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(run, KINDS))


def _fit(kind: str, folder: Path, device: str, max_steps: int, tag: str, threads: int) -> float:
    """Train; seconds it took. Its whole output is in `<kind>.log`; its steps are shown."""
    options = ["--config", "sft.yaml"]
    if kind == "original":
        options += ["--config", "original.yaml"]
    options += [f"--val_every_steps={LOOKS[kind]}"]
    options += [f"--data.train_path={folder / 'chats' / 'sft_train.jsonl'}"]
    options += [f"--data.val_path={folder / 'chats' / 'sft_val.jsonl'}", f"--trainer.max_steps={max_steps}"]
    options += [f"--run_dir={folder / kind}", f"--device={device}", "--overwrite", "--export=none"]
    return run_fit(options, folder / f"{kind}.log", tag=tag, threads=threads)


def _read(kind: str, folder: Path, seconds: float) -> Run:
    from minimind_sft.readings import read_metrics

    rows = [row for row in read_metrics(folder / "metrics.csv") if "val/chat/loss" in row]
    path = [(row["val/chat/loss"], row["val/forgetting"]) for row in rows]
    probes = json.loads((folder / "probes.json").read_text(encoding="utf-8"))
    return Run(kind, seconds, path, rows[-1]["val/pretrain/loss"], probes)


def _interpolated(folder: Path, device: str) -> list[tuple[float, float]]:
    """(chat loss, forgetting) at `ALPHAS` on the line from the base to the held model."""
    from minimind_sft.chat import ChatTemplate
    from minimind_sft.interpolation import curve
    from minimind_sft.pairs import Fed, open_pair
    from minimind_sft.stores import Stores

    tokenizer = DATA / "tokenizer"
    pair = open_pair(
        str(DATA / "base.pth"),
        str(folder / "held" / "checkpoints" / "last.ckpt"),
        ChatTemplate.from_folder(tokenizer),
        left_open={},
        device=device,
        fed=Fed(),
    )
    stores = Stores(
        train_path=[],
        tokenizer=str(tokenizer),
        val_path=str(folder / "chats" / "sft_val.jsonl"),
        heldout_path=str(DATA / "heldout.jsonl"),
    )
    return [(point.chat_loss, point.forgetting) for point in curve(pair, stores, ALPHAS, tell=False)]


def forgotten_at(path: Sequence[tuple[float, float]], loss: float) -> float | None:
    """What a run had forgotten when its chat loss first came down to `loss`; straight lines between its readings."""
    for (chat, forgotten), (next_chat, next_forgotten) in zip(path, path[1:], strict=False):
        if next_chat <= loss < chat:
            return forgotten + (next_forgotten - forgotten) * (chat - loss) / (chat - next_chat)
    return None


def _table(runs: Sequence[Run], words: dict[str, str]) -> str:
    from minimind_sft.report import table

    first = runs[0]
    base_text = first.text_loss - first.path[-1][1]
    rows = [
        (words["chats"], f"{first.path[0][0]:.4f}", *(f"{run.path[-1][0]:.4f}" for run in runs)),
        (words["text"], f"{base_text:.4f}", *(f"{run.text_loss:.4f}" for run in runs)),
        (words["forgotten"], "", *(f"{run.path[-1][1]:+.4f}" for run in runs)),
    ]
    reached = max(run.path[-1][0] for run in runs)
    at = [forgotten_at(run.path, reached) for run in runs]
    rows.append((words["at"].format(loss=reached), "", *("-" if value is None else f"{value:+.4f}" for value in at)))
    for group in ("raw/not_in_sft", "raw/in_sft", "chat/not_in_sft", "chat/in_sft"):
        counts = [run.probes["groups"][group] for run in runs]
        shares = [counts[0]["before"], *(count["after"] for count in counts)]
        rows.append((words[group], *(f"{share / counts[0]['probes']:.0%}" for share in shares)))
    lost = [str(run.probes["groups"]["raw/not_in_sft"]["lost"]) for run in runs]
    rows.append((words["lost"], "", *lost))
    rows.append((words["seconds"], "", *(f"{run.seconds:.0f}" for run in runs)))
    return table(("", words["base"], words["original"], words["held"]), rows)


def _lost(run: Run, words: dict[str, str]) -> str:
    from minimind_sft.report import lost_facts

    lost = lost_facts(run.probes)
    return words["forgot"].format(kind=words[run.kind], count=len(lost), named="; ".join(lost[:NAMED]) or "-")


def _plot(runs: Sequence[Run], between: Sequence[tuple[float, float]], path: Path) -> None:
    from minimind_sft.report import chat_against_forgetting

    with chat_against_forgetting(path, "Learning to chat: what it cost", (8, 5)) as axes:
        for run, color in zip(runs, ("#D55E00", "#0072B2"), strict=True):
            chat, forgotten = zip(*run.path, strict=True)
            axes.plot(chat, forgotten, color=color, linewidth=2, marker="o", markersize=4)
            where: dict[str, Any] = {"textcoords": "offset points", "xytext": (8, 0), "va": "center", "color": color}
            axes.annotate(run.kind, (chat[-1], forgotten[-1]), fontweight="bold", **where)
        axes.plot(*zip(*between, strict=True), color="#009E73", linewidth=2, linestyle=":")
        where = {"textcoords": "offset points", "xytext": (0, -22), "ha": "center", "color": "#009E73"}
        axes.annotate("base to held, interpolated", between[len(between) // 2], **where)
        base = runs[0].path[0]
        axes.plot(*base, color="black", marker="o", markersize=9)
        axes.annotate("base", base, textcoords="offset points", xytext=(0, 10), ha="center")
        axes.axvline(max(run.path[-1][0] for run in runs), color="0.6", linewidth=1, linestyle="--")
