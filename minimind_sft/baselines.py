"""What the base read and answered at step 0, kept in the cache: runs from one base on the same documents, as those of
`budget` and `demo` are, measure and ask it once.

It is taken up again only where it would come out the same: the same base and output layer, the same documents cut alike
or the same questions, the same device, precision and threads, the same version of torch. A look at 1,000 documents of
text and 500 chats takes a base of 5 M parameters two minutes on one core. Several processes measure anew, for their
caches may differ.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from minimind_sft.files import write_whole
from minimind_sft.forgetting import Reading
from minimind_sft.identity import of_measured
from minimind_sft.probes import Reply

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule
    from minimind_sft.module import SFTModule

VERSION = 1  # raise it when a reading or an answer changes


class Baseline(NamedTuple):
    """The base at step 0: on everything, on the live documents (None where those are all), and what it took."""

    reading: Reading
    live: Reading | None
    seconds: float


class Baselines:
    """Those of one run's base, data and device; see the module."""

    def __init__(self, data: SFTDataModule, module: SFTModule, live_share: float) -> None:
        known = {
            "documents": of_measured(data),
            "stores": {name: found.store.folder.name for name, found in data.evaluation.items()},  # with their sources
            "drawn": [data.seed, data.empty_think_ratio, live_share],
        }
        self.path = _place("baseline", known, data, module)

    def find(self) -> Baseline | None:
        """What an earlier run read, if one did."""
        if self.path is None or not self.path.is_file():
            return None
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        live = found["live"] and Reading(**found["live"])
        return Baseline(Reading(**found["reading"]), live, found["seconds"])

    def keep(self, baseline: Baseline) -> None:
        """Keep it for later runs."""
        if self.path is not None:
            live = baseline.live and asdict(baseline.live)
            figures = {"reading": asdict(baseline.reading), "live": live, "seconds": baseline.seconds}
            write_whole(self.path, json.dumps(figures) + "\n")


class BaseAnswers:
    """What one run's base answers: to the probes, and to the prompts of the sample answers.

    Args:
        asked: all that decides the questions beside the tokenizer.
    """

    def __init__(self, data: SFTDataModule, module: SFTModule, asked: dict[str, Any]) -> None:
        self._path = _place("answers", {"tokenizer": data.template.fingerprint, **asked}, data, module)

    def find(self) -> tuple[list[Reply], list[str]] | None:
        """What an earlier run was answered, if one asked the same."""
        if self._path is None or not self._path.is_file():
            return None
        found: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return [Reply(**reply) for reply in found["replies"]], found["answers"]

    def keep(self, replies: list[Reply], answers: list[str]) -> None:
        """Keep them for later runs."""
        if self._path is not None:
            found = {"replies": [asdict(reply) for reply in replies], "answers": answers}
            write_whole(self._path, json.dumps(found) + "\n")


def _place(kind: str, known: dict[str, Any], data: SFTDataModule, module: SFTModule) -> Path | None:
    """The file in the cache for what this base says of what is `known`; None where it is not to be kept."""
    if module.from_scratch or module.trainer.world_size > 1:
        return None
    known = known | {
        "version": VERSION,
        "base": module.start.sha256,
        "model": asdict(module.model.config),
        "head": [module.start.reset_head, module.seed],
        "device": [str(module.device.type), str(module.trainer.precision), torch.get_num_threads()],
        "torch": torch.__version__,
    }
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
    return data.stores.cache / f"{kind}-{name}.json"
