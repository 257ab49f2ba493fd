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


class _Kept:
    """What an earlier run found, in a file of the cache.

    Args:
        kind: the file's name begins so.
        known: all that it depends on beside the base and the device.
    """

    def __init__(self, kind: str, known: dict[str, Any], data: SFTDataModule, module: SFTModule) -> None:
        self._path = _place(kind, known, data, module)

    def _read(self) -> dict[str, Any] | None:
        if self._path is None or not self._path.is_file():
            return None
        found: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return found

    def _write(self, found: dict[str, Any]) -> None:
        if self._path is not None:
            write_whole(self._path, json.dumps(found) + "\n")


class Baselines(_Kept):
    """Those of one run's base, data and device; see the module."""

    def __init__(self, data: SFTDataModule, module: SFTModule, live_share: float) -> None:
        known = {
            "documents": of_measured(data),
            "stores": {name: found.store.folder.name for name, found in data.evaluation.items()},  # with their sources
            "drawn": [data.seed, data.empty_think_ratio, live_share],
        }
        super().__init__("baseline", known, data, module)

    def find(self) -> Baseline | None:
        """What an earlier run read, if one did."""
        if (found := self._read()) is None:
            return None
        live = found["live"] and Reading(**found["live"])
        return Baseline(Reading(**found["reading"]), live, found["seconds"])

    def keep(self, baseline: Baseline) -> None:
        """Keep it for later runs."""
        live = baseline.live and asdict(baseline.live)
        self._write({"reading": asdict(baseline.reading), "live": live, "seconds": baseline.seconds})


class BaseAnswers(_Kept):
    """What one run's base answers: to the probes, and to the prompts of the sample answers.

    Args:
        asked: all that decides the questions beside the tokenizer.
    """

    def __init__(self, data: SFTDataModule, module: SFTModule, asked: dict[str, Any]) -> None:
        super().__init__("answers", {"tokenizer": data.template.fingerprint, **asked}, data, module)

    def find(self) -> tuple[list[Reply], list[str]] | None:
        """What an earlier run was answered, if one asked the same."""
        if (found := self._read()) is None:
            return None
        return [Reply(**reply) for reply in found["replies"]], found["answers"]

    def keep(self, replies: list[Reply], answers: list[str]) -> None:
        """Keep them for later runs."""
        self._write({"replies": [asdict(reply) for reply in replies], "answers": answers})


def _place(kind: str, known: dict[str, Any], data: SFTDataModule, module: SFTModule) -> Path | None:
    """The file in the cache for what this base says of what is `known`; None where it is not to be kept."""
    if module.from_scratch or module.trainer.world_size > 1:
        return None
    known = known | {
        "version": VERSION,
        "base": module.start.sha256,
        "model": asdict(module.model.config),
        "device": [str(module.device.type), str(module.trainer.precision), torch.get_num_threads()],
        "torch": torch.__version__,
    }
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
    return data.stores.cache / f"{kind}-{name}.json"
