"""What is named as weights, and what lies around it: a file, a folder, a Hugging Face folder, a run, a name on the hub.

A run directory stands for its `best.ckpt`, or `last.ckpt` where there is none. Weights inside a run directory (its
checkpoints, its exports) know the run's tokenizer, framing and records, so whoever exports or chats need not say them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from minimind_sft import hub
from minimind_sft.files import resolve, sha256_file

BEST, LAST = "best.ckpt", "last.ckpt"
RECORDS = ("config.yaml", "run.json")  # what makes a folder a run directory


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Attributes:
        path: what `weights.load` reads: a file or a folder.
        run_dir: the run directory that it lies in, if any.
    """

    path: Path
    run_dir: Path | None

    @cached_property
    def _config(self) -> Any:
        """What the run's `config.yaml` holds, read once; None where it cannot be read."""
        if self.run_dir is None:
            return None
        try:
            return yaml.safe_load((self.run_dir / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None

    def setting(self, section: str, key: str) -> Any:
        """A setting of the run, as its `config.yaml` has it; None where there is none."""
        try:
            return self._config[section].get(key)
        except (KeyError, TypeError, AttributeError):
            return None  # a record that was edited by hand is no reason to refuse weights

    @property
    def replays(self) -> bool:
        """Whether the run replayed, or read, pretraining text from files."""
        reads = self.setting("data", "replay_ratio") or self.setting("model", "fisher_tokens") or self._terms_read
        own = replays_own(self.setting("data", "replay_source"), self.setting("data", "pretrain_path"))
        return bool(reads) and not own

    @property
    def _terms_read(self) -> bool:
        """Whether one of `model.terms` reads text before the first step."""
        try:
            return any(term["init_args"].get("tokens") for term in self.setting("model", "terms") or ())
        except (KeyError, TypeError, AttributeError):
            return False

    @property
    def replays_all(self) -> bool:
        """Whether it may have replayed any document of these files: what it measured on was other text."""
        return self.replays and bool(self.setting("data", "heldout_path"))

    @property
    def halves(self) -> bool:
        """Whether it measured on one part of these files and replayed another, see `PretrainingText.measured`."""
        return self.replays and not self.replays_all

    def unreplayed(self, documents: int) -> int:
        """Of so many documents of `pretrain_path` to measure on, chosen by content hash, those that a run which
        measured on the first of them did not replay."""
        measured = self.setting("data", "measure_documents")
        return min(documents, measured) if self.halves and type(measured) is int else documents

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What the run's `run.json` holds; nothing where it cannot be read."""
        if self.run_dir is None:
            return {}
        try:
            facts = json.loads((self.run_dir / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    @property
    def base_sha256(self) -> str | None:
        """Of the weights that the run began from; None where nothing tells."""
        return self._facts.get("base_sha256")

    def tokenizer(self, given: str | None = None) -> Path:
        """Folder of the tokenizer: the given one, else the run's, else what `tokenizer_beside` finds.

        Raises:
            ValueError: nothing tells, or there are no weights.
        """
        if given is not None:
            return hub.local(resolve(given))
        if not self.path.exists():
            raise ValueError(f"{self.path} does not exist; it is a run, a weights file, or a Hugging Face folder")
        if (found := self.known_tokenizer()) is not None:
            return found
        raise ValueError(
            f"which tokenizer belongs to {self.path}? There is no tokenizer.json in or beside it, and no run around it "
            "that tells; name the folder that holds its tokenizer.json with --tokenizer FOLDER"
        )

    def known_tokenizer(self) -> Path | None:
        """Folder of the tokenizer in these weights, of their run, or beside them; None where there is none.

        A run's is looked for where it was, then by its name in `config.yaml`, and known by its content.

        Raises:
            ValueError: the run's is no longer there.
        """
        if (self.path / "tokenizer.json").is_file():
            return self.path
        named = self.setting("data", "tokenizer")
        if isinstance(named, str):
            kept = self._facts.get("tokenizer", {})
            for folder in (Path(kept.get("folder", named)), hub.local(resolve(named))):
                found = tokenizer_sha256(folder)
                if found is not None and found == kept.get("sha256", found):
                    return folder
            raise ValueError(
                f"the run {self.run_dir} was trained with the tokenizer in {kept.get('folder', named)}, which is not "
                "there any more, or is another; say where it is with --tokenizer FOLDER"
            )
        return tokenizer_beside(self.path)


def tokenizer_sha256(folder: Path) -> str | None:
    """Of the tokenizer.json in a folder; None where there is none."""
    file = folder / "tokenizer.json"
    return sha256_file(file) if file.is_file() else None


def replays_own(replay_source: str | None, pretrain_path: Any) -> bool:
    """Whether a run with these settings of `data` replays, or reads, text that the base writes."""
    return replay_source == "self" or replay_source == "auto" and pretrain_path is None


def tokenizer_beside(path: Path) -> Path | None:
    """The folder of the tokenizer that lies in, beside, or in `tokenizer/` beside weights; None where there is none."""
    beside = path if path.is_dir() else path.parent
    return next((f for f in (beside, beside / "tokenizer") if (f / "tokenizer.json").is_file()), None)


def find_origin(source: str | Path) -> Origin:
    """What a user means by a name of weights. Whether it can be read is for `weights.load` to say.

    Raises:
        ValueError: a hub name that cannot be fetched.
    """
    path = hub.local(source)
    for name in (BEST, LAST):
        file = path / "checkpoints" / name
        if file.is_file() and not (path / "config.json").is_file():
            return Origin(file, _run_around(path))
    return Origin(path, _run_around(path))


def as_trained(origins: Sequence[Origin], key: str, default: Any) -> Any:
    """The setting of `data` of the first of these that a run tells it of, if it is of the default's type."""
    told = (origin.setting("data", key) for origin in origins)
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    return next((value for value in told if type(value) in kinds), default)


def _run_around(path: Path) -> Path | None:
    """The run directory that is, or holds, this path: RUN, RUN/checkpoints/best.ckpt, RUN/export/best/FILE."""
    for folder in (path.absolute(), *path.absolute().parents[:3]):
        if is_run(folder):
            return folder
    return None


def is_run(folder: Path) -> bool:
    """Whether `fit` began a run in this folder."""
    return all((folder / name).is_file() for name in RECORDS)
