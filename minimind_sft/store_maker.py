"""Lines to tokenized stores under the cache folder: made once for the same files and settings, opened ever after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minimind_sft import corpus
from minimind_sft.chat import ChatTemplate
from minimind_sft.corpus import Store
from minimind_sft.files import Files
from minimind_sft.progress import track
from minimind_sft.report import rejected
from minimind_sft.sampling import read_lines

CHATS = ("train", "whole")  # kinds of stores
Build = Callable[..., None]  # `corpus.build` without the folder and what is the same for all stores of a run


@dataclass(frozen=True)
class StoreMaker:
    """What all stores of a run have in common. The settings are those of `data.SFTDataModule`, by the same names.

    Args:
        cache: the folder of all stores.
        files: finds files, and knows their hashes.
        template: tokenizer and chat template.
    """

    cache: Path
    files: Files
    template: ChatTemplate
    format: str
    document_format: str
    supervise: str
    supervise_reasoning: bool
    max_bad_ratio: float
    workers: int | None

    @property
    def supervises(self) -> list[Any]:
        """The settings that say which tokens of a chat are learned."""
        return [self.supervise, self.supervise_reasoning]

    def open(self, kind: str, files: list[Path], fill: Callable[[Build], None], **more: Any) -> Store:
        """The store of these files, from the cache or filled now.

        Args:
            kind: what is made of the files, one of `CHATS` for chats; with them, and `more`, it tells stores apart.
            fill: calls what it is given with the lines and whatever else `corpus.build` takes.
            more: settings that the store depends on.
        """
        format = self.format if kind in CHATS else "auto"  # a format of chats says nothing of text
        key = {
            "kind": kind,
            "files": self.hashes(files),
            "tokenizer": self.template.fingerprint,
            "format": [format, self.document_format, *self.supervises],
            **more,
        }
        common: dict[str, Any] = {
            "template": self.template,
            "format": format,
            "document_format": self.document_format,
            "supervise": self.supervise,
            "reasoning": self.supervise_reasoning,
            "workers": self.workers,
        }

        def make(folder: Path) -> None:
            fill(partial(corpus.build, folder, **common))
            for (name, before), (_, after) in zip(key["files"], self.hashes(files), strict=True):
                if before != after:
                    raise ValueError(f"{name} changed while it was read: begin again, once nothing writes to it")

        return corpus.open_or_build(self.cache, key, make)

    def whole(self, setting: str, paths: str | list[str]) -> Store:
        """The store of every line of the files that a setting names, checked."""
        files = self.files.expand(paths, setting)

        def fill(build: Build) -> None:
            with track(f"tokenizing {setting}") as progress:
                build(read_lines(files), progress=progress)

        return self.checked(self.open("whole", files, fill), setting)

    def hashes(self, files: Sequence[Path]) -> list[list[str]]:
        """Every file with its SHA-256."""
        return [[str(path), facts.sha256] for path, facts in zip(files, self.files.facts(files), strict=True)]

    def checked(self, store: Store, setting: str) -> Store:
        """The store itself.

        Raises:
            ValueError: nothing in it, or more bad lines than `max_bad_ratio`; with the first of them.
        """
        bad = sum(store.rejected.values())
        lines = bad + len(store)
        if lines == 0:
            raise ValueError(f"{setting}: no line in {', '.join(store.meta['files']) or 'the files'}; nothing to use")
        if bad > self.max_bad_ratio * lines:
            first = next(store.rejections())
            raise ValueError(
                f"{setting}: {bad} of {lines} lines cannot be used ({rejected(store.rejected)}), more than "
                f"data.max_bad_ratio = {self.max_bad_ratio:g} allows. "
                f"The first: {first['file']}:{first['line']}: {first['detail']}. "
                + (
                    "Correct these lines, or raise data.max_bad_ratio"
                    if len(store)
                    else 'A line of text is {"text": "..."}; README.md lists the formats of chats'
                )
            )
        return store
