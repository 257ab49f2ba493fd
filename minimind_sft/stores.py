"""Files and settings to stores: what is trained on, validated on and measured on. No torch.

Paths are resolved, the sample is selected, and everything is tokenized once into stores under the cache folder
(`corpus.py`); a second run opens them. What would spoil a run is refused here, before anything is trained: more bad
lines than `max_bad_ratio`, held-out text that the chats repeat. `fit` and `inspect` both come through here, so that
what is looked at is what is trained on. Who gets which document is `dealing.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimind_sft import hub, overlap
from minimind_sft.caps import Caps
from minimind_sft.chat import DOCUMENT_FRAMES, ChatTemplate
from minimind_sft.corpus import Store
from minimind_sft.dealing import Dealt, deal
from minimind_sft.documents import TOO_LONG, Documents
from minimind_sft.files import Files, default_cache, resolve
from minimind_sft.mixture import Part, parts_of
from minimind_sft.pretraining_text import UNSEEN, PretrainingText
from minimind_sft.progress import track
from minimind_sft.ranges import check_ranges
from minimind_sft.sampling import Line, read_lines, select
from minimind_sft.store_maker import Build, StoreMaker
from minimind_sft.system_prompts import find_prompts, read_prompts

SUPERVISE = ("all", "last")


class Opened(NamedTuple):
    """Stores that are open; None where there is none."""

    train: Store | None
    validation: Store | None  # chats
    measured: Store | None  # text that forgetting is measured on
    replay: Store | None = None  # text of pretraining, none of it measured
    own_chats: Store | None = None  # chats that the base wrote; files have none
    repeats: np.ndarray | None = None  # (D,) bool: which of `replay` repeat measured text nearly word for word


class Stores:
    """The data of a run. The settings are those of `data.SFTDataModule`, by the same names.

    Attributes:
        tokenizer: its folder.
        template: tokenizer and chat template.
        cache: the folder of all stores.
        text: of pretraining, to measure on and to replay.
        probes: the files of fact probes, or none.

    Raises:
        ValueError: with the setting, file, line, value and remedy.
    """

    def __init__(
        self,
        *,
        train_path: str | list[str | dict[str, Any]],
        tokenizer: str,
        val_path: str | list[str] | None = None,
        pretrain_path: str | list[str] | None = None,
        heldout_path: str | list[str] | None = None,
        max_mb: float | None = 72.0,
        max_ratio: float | None = None,
        pretrain_mb: float | None = None,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        seed: int = 42,
        max_length: int = 768,
        too_long: str = "truncate_right",
        supervise: str = "all",
        supervise_reasoning: bool = True,
        val_fraction: float | None = None,
        system_prompts: str | list[str] | None = None,
        max_bad_ratio: float = 0.01,
        max_overlap: float = 0.2,
        measure_documents: int = 1_000,
        replay_documents: int = 20_000,
        format: str = "auto",
        document_format: str = "minimind3",
        probes_path: str | None = None,
        cache_dir: str | None = None,
        workers: int | None = None,
    ) -> None:
        self.train_path, self.val_path, self.val_fraction = train_path, val_path, val_fraction
        self.max_length, self.too_long, self.seed = max_length, too_long, seed
        self.max_overlap, self.format = max_overlap, format
        check_ranges(
            "data",
            val_fraction=val_fraction,
            max_bad_ratio=max_bad_ratio,
            max_overlap=max_overlap,
            pretrain_mb=pretrain_mb,
            seed=seed,
            max_length=max_length,
            measure_documents=measure_documents,
            replay_documents=replay_documents,
            workers=workers,
        )
        for name, value, known in (
            ("supervise", supervise, SUPERVISE),
            ("too_long", too_long, TOO_LONG),
            ("document_format", document_format, tuple(DOCUMENT_FRAMES)),
        ):
            if value not in known:
                raise ValueError(f"data.{name} {value!r} is not known; choose one of {', '.join(known)}")
        if val_fraction is not None and val_path is not None:
            raise ValueError("data.val_path and data.val_fraction are both set; set one of them to null")
        self.cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self._files = Files(self.cache)
        self.probes = self._files.expand(probes_path, "data.probes_path") if probes_path else []
        self.tokenizer = hub.local(resolve(tokenizer))
        self.template = ChatTemplate.from_folder(self.tokenizer)
        self._maker = StoreMaker(
            cache=self.cache,
            files=self._files,
            template=self.template,
            format=format,
            document_format=document_format,
            supervise=supervise,
            supervise_reasoning=supervise_reasoning,
            max_bad_ratio=max_bad_ratio,
            workers=workers,
        )
        self.text = PretrainingText(
            self._maker, pretrain_path, heldout_path, pretrain_mb, measure_documents, replay_documents
        )
        size = None if max_ratio is None else self.text.size
        self.caps = Caps(max_mb, max_ratio, max_rows, max_tokens, size)
        self.caps.check()
        if not supervise_reasoning:
            self.template.require_reasoning()
        self.prompts = None if system_prompts is None else find_prompts(self.template, read_prompts(system_prompts))

    @property
    def supervises(self) -> list[Any]:
        """The settings that say which tokens of a chat are learned."""
        return self._maker.supervises

    def open(self, *, train: bool, replay: bool = False, halve: bool = False) -> Opened:
        """Open the stores, from the cache or made now.

        Args:
            train: whether the training chats are wanted too; with `val_fraction` they always are.
            replay: whether the text to replay is.
            halve: whether `pretrain_path`, where it is measured on, must leave as much of itself to replay.

        Raises:
            ValueError: for files that are not there, too many bad lines, or held-out text that the chats repeat.
        """
        chats = self.train_store() if train or self.val_fraction else None
        validation = None if self.val_path is None else self._maker.whole("data.val_path", self.val_path)
        measured = self.text.measured(halve=halve)
        if self.text.kind == UNSEEN and self.max_overlap < 1 and chats is not None and measured is not None:
            overlap.refuse(self.cache, measured, chats, self.template.decode, most=self.max_overlap)
        if not replay:
            return Opened(chats, validation, measured)
        spare, repeats = self.text.replayed(halve=halve), None
        if measured is not None and self.max_overlap < 1:
            repeats = overlap.near_copies(self.cache, spare, measured, self.template.decode, most=self.max_overlap)
        return Opened(chats, validation, measured, spare, repeats=repeats)

    def documents(self, opened: Opened) -> Dealt:
        """What is trained on, validated on, measured on and replayed, no document in two of them; see `deal`."""
        return deal(
            *opened[:4],
            max_length=self.max_length,
            too_long=self.too_long,
            val_fraction=self.val_fraction,
            prompts=self.prompts,
            repeats=opened.repeats,
        )

    def train_store(self) -> Store:
        """The sample of `train_path`, tokenized.

        `meta["note"]` is what `Caps.note` notes.
        """
        (files, parts), caps = self._train_files(), self.caps
        if not caps.given and any(part.weight for part in parts):
            raise ValueError("data.train_path has weights, which divide a cap over all: set data.max_mb, say")

        def fill(build: Build) -> None:
            selection = select(files, max_mb=caps.size[1], max_rows=caps.max_rows, seed=self.seed, parts=parts)
            caps.require_some(selection)
            with track("tokenizing the chats", total=selection.selected) as progress:
                # everything: the order of the sample means nothing, so the files' own order is kept
                build(
                    selection.lines() if caps.given or parts else read_lines(files),
                    progress=progress,
                    note=partial(caps.note, selection),
                    max_tokens=caps.max_tokens,
                    max_length=self.max_length,
                )

        more: dict[str, Any] = {"sources": parts} if parts else {}
        if caps.max_tokens is not None:
            more["max_length"] = self.max_length
        store = self._maker.open("train", files, fill, caps=caps, seed=self.seed, **more)
        return self._maker.checked(store, "data.train_path")

    def _train_files(self) -> tuple[list[Path], list[Part]]:
        return parts_of(self.train_path, partial(self._files.expand, key="data.train_path"), "data.train_path")

    def validation_lines(self, validation: Documents | None) -> Iterator[Line]:
        """The lines of the validation chats, in the files' order; none where there are none."""
        if self.val_path:
            yield from read_lines(self._files.expand(self.val_path, "data.val_path"))
        elif validation is not None:
            store = validation.store
            names = store.meta["files"]
            places = {(names[store.line_files[n]], int(store.line_numbers[n])) for n in validation.index}
            lines = read_lines(self._train_files()[0])
            yield from (line for line in lines if (line.file, line.number) in places)
