"""Files and settings to stores: what is trained on, validated on and measured on. No torch.

Paths are resolved, the sample is selected, and everything is tokenized once into stores under the cache folder
(`corpus.py`); a second run opens them. What would spoil a run is refused here, before anything is trained: more bad
lines than `max_bad_ratio`, held-out text that the chats repeat. `fit` and `inspect` both come through here, so that
what is looked at is what is trained on. Who gets which document is `dealing.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minimind_sft import corpus, hub, overlap
from minimind_sft.caps import Caps
from minimind_sft.chat import ChatTemplate
from minimind_sft.corpus import Store
from minimind_sft.dealing import Dealt, choose_by_hash, deal, without
from minimind_sft.documents import TOO_LONG, Documents
from minimind_sft.files import Files, default_cache, resolve
from minimind_sft.mixture import Part, parts_of
from minimind_sft.progress import track
from minimind_sft.ranges import check_ranges
from minimind_sft.report import rejected
from minimind_sft.sampling import Line, read_lines, select
from minimind_sft.selection import MEBIBYTE
from minimind_sft.system_prompts import find_prompts, read_prompts

NO_TEXT = "data.replay_ratio and model.fisher_tokens to 0 (and leave out model.terms that read text)"
SEEN, UNSEEN, SELF_WRITTEN = "seen", "unseen", "self-written"  # what text to measure on is to the base


class Opened(NamedTuple):
    """Stores that are open; None where there is none."""

    train: Store | None
    validation: Store | None  # chats
    measured: Store | None  # text that forgetting is measured on
    replay: Store | None = None  # text of pretraining, none of it measured
    own_chats: Store | None = None  # chats that the base wrote; files have none


class Stores:
    """The data of a run. The settings are those of `data.SFTDataModule`, by the same names.

    Attributes:
        template: tokenizer and chat template.
        cache: the folder of all stores.
        probes: the file of fact probes, or None.

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
        self.train_path, self.val_path = train_path, val_path
        self.pretrain_path, self.heldout_path = pretrain_path, heldout_path
        self.pretrain_mb = pretrain_mb
        self.max_length, self.too_long, self.val_fraction = max_length, too_long, val_fraction
        self.supervise, self.supervise_reasoning = supervise, supervise_reasoning
        self.seed, self.max_bad_ratio, self.max_overlap = seed, max_bad_ratio, max_overlap
        self.measure_documents, self.replay_documents = measure_documents, replay_documents
        self.format, self.document_format, self.workers = format, document_format, workers
        self.cache = Path(cache_dir) if cache_dir else default_cache()
        self.files = Files(self.cache)
        self.probes = self.files.expand(probes_path, "data.probes_path")[0] if probes_path else None
        self._check()
        size = None if max_ratio is None else self.pretrain_bytes
        self.caps = Caps(max_mb, max_ratio, max_rows, max_tokens, size)
        self.caps.check()
        self.template = ChatTemplate.from_folder(hub.local(resolve(tokenizer)))
        if not supervise_reasoning:
            self.template.require_reasoning()
        self.prompts = None if system_prompts is None else find_prompts(self.template, read_prompts(system_prompts))

    def _check(self) -> None:
        check_ranges(
            "data",
            val_fraction=self.val_fraction,
            max_bad_ratio=self.max_bad_ratio,
            max_overlap=self.max_overlap,
            pretrain_mb=self.pretrain_mb,
            seed=self.seed,
            max_length=self.max_length,
        )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"data.workers is {self.workers}; it counts processes, from 1, or null for one per core")
        for name in ("measure_documents", "replay_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it counts documents and must be at least 1")
        if self.supervise not in ("all", "last"):
            raise ValueError(f"data.supervise {self.supervise!r} is not known; choose all or last")
        if self.too_long not in TOO_LONG:
            raise ValueError(f"data.too_long {self.too_long!r} is not known; choose one of {', '.join(TOO_LONG)}")
        if self.val_fraction is not None and self.val_path is not None:
            raise ValueError("data.val_path and data.val_fraction are both set; set one of them to null")

    @property
    def text(self) -> str | None:
        """Whether the base has seen the text that forgetting is measured on (`SEEN`, `UNSEEN`); None where there is no
        text."""
        if self.heldout_path is not None:
            return UNSEEN
        return None if self.pretrain_path is None else SEEN

    @property
    def pretrain_bytes(self) -> int | None:
        """Bytes of pretraining text, uncompressed; None where nothing tells."""
        if self.pretrain_mb is not None:
            return int(self.pretrain_mb * MEBIBYTE)
        if self.pretrain_path is None:
            return None
        return sum(
            self.files.facts(path).text_bytes for path in self.files.expand(self.pretrain_path, "data.pretrain_path")
        )

    @property
    def supervises(self) -> list[Any]:
        """The settings that say which tokens of a chat are learned."""
        return [self.supervise, self.supervise_reasoning]

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
        validation = None if self.val_path is None else self._whole_store("val_path", self.val_path)
        halve = halve and self.heldout_path is None
        measured = self._measure_store(halve)
        if self.heldout_path is not None and self.max_overlap < 1 and chats is not None and measured is not None:
            self._refuse_overlap(chats, measured)
        return Opened(chats, validation, measured, self._replay_store(halve) if replay else None)

    def documents(self, opened: Opened) -> Dealt:
        """What is trained on, validated on and measured on, no document in two of them; see `deal`."""
        return deal(
            *opened[:3],
            max_length=self.max_length,
            too_long=self.too_long,
            val_fraction=self.val_fraction,
            prompts=self.prompts,
        )

    def train_store(self) -> Store:
        """The sample of `train_path`, tokenized.

        `meta["note"]` is what `Caps.note` notes.
        """
        (files, parts), caps = self._train_files(), self.caps
        if not caps.given and any(part.weight for part in parts):
            raise ValueError("data.train_path has weights, which divide a cap over all: set data.max_mb, say")

        def make(folder: Path) -> None:
            selection = select(files, max_mb=caps.size[1], max_rows=caps.max_rows, seed=self.seed, parts=parts)
            selection.require_some()
            with track("tokenizing the chats", total=selection.selected) as progress:
                # everything: the order of the sample means nothing, so the files' own order is kept
                corpus.build(
                    folder,
                    selection.lines() if caps.given or parts else read_lines(files),
                    progress=progress,
                    note=partial(caps.note, selection),
                    max_tokens=caps.max_tokens,
                    max_length=self.max_length,
                    **self._tokenization,
                )

        key = self._key("train", files, caps=caps, seed=self.seed)
        if parts:
            key["sources"] = parts
        if caps.max_tokens is not None:
            key["max_length"] = self.max_length
        return self._checked(corpus.open_or_build(self.cache, key, make), "data.train_path")

    def _train_files(self) -> tuple[list[Path], list[Part]]:
        return parts_of(self.train_path, partial(self.files.expand, key="data.train_path"), "data.train_path")

    def validation_lines(self, validation: Documents | None) -> Iterator[Line]:
        """The lines of the validation chats, in the files' order; none where there are none."""
        if self.val_path:
            yield from read_lines(self.files.expand(self.val_path, "data.val_path"))
        elif validation is not None:
            store = validation.store
            names = store.meta["files"]
            places = {(names[store.line_files[n]], int(store.line_numbers[n])) for n in validation.index}
            lines = read_lines(self._train_files()[0])
            yield from (line for line in lines if (line.file, line.number) in places)

    def _whole_store(self, name: str, paths: str | list[str]) -> Store:
        files = self.files.expand(paths, f"data.{name}")

        def make(folder: Path) -> None:
            with track(f"tokenizing data.{name}") as progress:
                corpus.build(folder, read_lines(files), progress=progress, **self._tokenization)

        return self._checked(corpus.open_or_build(self.cache, self._key("whole", files), make), f"data.{name}")

    def _measure_store(self, halve: bool) -> Store | None:
        name = "heldout_path" if self.heldout_path else "pretrain_path"
        paths = self.heldout_path or self.pretrain_path
        if paths is None:
            return None
        files = self.files.expand(paths, f"data.{name}")
        known = self.files.expand(self.pretrain_path, "data.pretrain_path") if self.pretrain_path else []
        known = known if self.heldout_path else []

        def make(folder: Path) -> None:
            with track(f"tokenizing data.{name}") as progress:
                if self.heldout_path:
                    chosen = choose_by_hash(read_lines(files), self.measure_documents)
                else:
                    chosen = self._measured_and_replayed(read_lines(files), halve)[0]
                unseen = without(chosen, read_lines(known))
                note = {"in_pretrain": len(chosen) - len(unseen)}
                if not unseen:
                    raise ValueError(
                        "data.heldout_path: every document also stands in data.pretrain_path, so none is unseen. Set "
                        "data.heldout_path to null, or to text that the base has not seen"
                    )
                corpus.build(folder, unseen, progress=progress, note=lambda _: note, **self._tokenization)

        key = self._key("measure", files, documents=self.measure_documents, known=self._hashes(known))
        key |= {"halves": True} if halve else {}
        return self._checked(corpus.open_or_build(self.cache, key, make), f"data.{name}")

    def _replay_store(self, halve: bool) -> Store:
        if self.pretrain_path is None:
            raise ValueError(
                "data.replay_ratio, or a term that reads text, asks for text to replay, but data.pretrain_path is not "
                "set. Set it to the text that the base was pretrained on (a part of it is enough), data.replay_source "
                f"to auto to let the base write it, or {NO_TEXT}"
            )
        files = self.files.expand(self.pretrain_path, "data.pretrain_path")
        held_out = self.files.expand(self.heldout_path, "data.heldout_path") if self.heldout_path else []

        def make(folder: Path) -> None:
            with track("tokenizing the text to replay") as progress:
                if held_out:
                    chosen = choose_by_hash(read_lines(files), self.replay_documents)
                else:
                    chosen = self._measured_and_replayed(read_lines(files), halve)[1]
                corpus.build(folder, without(chosen, read_lines(held_out)), progress=progress, **self._tokenization)

        measured = 0 if held_out else self.measure_documents
        key = self._key(
            "replay", files, documents=self.replay_documents, measured=measured, held_out=self._hashes(held_out)
        )
        key |= {"halves": True} if halve else {}
        store = corpus.open_or_build(self.cache, key, make)
        if not len(store):
            raise ValueError(
                "there is no text to replay or to read: data.pretrain_path has no document that is not measured on. "
                f"Give more text, set data.replay_source to self to let the base write it, or {NO_TEXT}"
            )
        return self._checked(store, "data.pretrain_path")

    def _measured_and_replayed(self, lines: Iterable[Line], halve: bool) -> tuple[list[Line], list[Line]]:
        """Of one text: what is measured on, those with the smallest hashes, and what is replayed."""
        chosen = choose_by_hash(lines, self.measure_documents + max(self.measure_documents, self.replay_documents))
        measured = self.measure_documents
        if halve:
            measured = min(measured, (len(chosen) + 1) // 2)
        return chosen[:measured], chosen[measured : measured + self.replay_documents]

    @property
    def _tokenization(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "format": self.format,
            "document_format": self.document_format,
            "supervise": self.supervise,
            "reasoning": self.supervise_reasoning,
            "workers": self.workers,
        }

    def _key(self, kind: str, files: list[Path], **more: Any) -> dict[str, Any]:
        return {
            "kind": kind,
            "files": self._hashes(files),
            "tokenizer": self.template.fingerprint,
            "format": [self.format, self.document_format, *self.supervises],
            **more,
        }

    def _hashes(self, files: list[Path]) -> list[list[str]]:
        return [[str(path), self.files.facts(path).sha256] for path in files]

    def _checked(self, store: Store, key: str) -> Store:
        bad = sum(store.rejected.values())
        lines = bad + len(store)
        if lines == 0:
            raise ValueError(f"{key}: no line in {', '.join(store.meta['files']) or 'the files'}; nothing to use")
        if bad > self.max_bad_ratio * lines:
            first = next(store.rejections())
            raise ValueError(
                f"{key}: {bad} of {lines} lines cannot be used ({rejected(store.rejected)}), more than "
                f"data.max_bad_ratio = {self.max_bad_ratio:g} allows. "
                f"The first: {first['file']}:{first['line']}: {first['detail']}. "
                + (
                    "Correct these lines, or raise data.max_bad_ratio"
                    if len(store)
                    else 'A line of text is {"text": "..."}; README.md lists the formats of chats'
                )
            )
        return store

    def _refuse_overlap(self, train: Store, held_out: Store) -> None:
        decode = self.template.decode
        shares = overlap.cached_shares(
            self.cache,
            [train.folder.name, held_out.folder.name],
            held_out=lambda: (decode(held_out.document(i)[0].tolist()) for i in range(len(held_out))),
            chats=lambda: (decode(train.document(i)[0].tolist()) for i in range(len(train))),
        )
        over = [i for i, share in enumerate(shares) if share > self.max_overlap]
        if over:
            worst = max(over, key=lambda i: shares[i])
            raise ValueError(
                f"data.heldout_path: {len(over)} documents share over {self.max_overlap:.0%} of their 50-character "
                f"shingles with the training chats; forgetting measured on them would be flattered. The worst: "
                f"{held_out.where(worst)} ({shares[worst]:.0%}). Remove them, or raise data.max_overlap"
            )
