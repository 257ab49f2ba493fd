"""The LightningDataModule: train chats, validation chats, and the pretraining text that forgetting is measured on.

What comes in are files and the settings below; what goes out are loaders of micro-batches. Selecting and tokenizing
happen once, in `prepare_data`, into stores under the cache folder; a second run opens them. Order, cuts and draws are
a plan (`batching.Plan`), a pure function of (seed, epoch), so that there is no position to save: a resumed run
derives it from the number of optimizer steps.

Loaders use no worker processes: laying a micro-batch out takes well under a millisecond, against the hundreds that it
trains for.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from minimind_sft import corpus, overlap
from minimind_sft.batching import Documents, MicroBatch, Plan
from minimind_sft.chat import ChatTemplate
from minimind_sft.corpus import Store
from minimind_sft.evaluation import EvaluationBatches, bytes_of_tokens, prompts
from minimind_sft.files import Files, default_cache, resolve
from minimind_sft.forgetting import CHAT, PRETRAIN
from minimind_sft.progress import track
from minimind_sft.sampling import Line, read_lines, select

RULE_OF_THUMB = (1_000, 10_000)  # SFT : pretraining, 1 : N
MEBIBYTE = 1 << 20


class SFTDataModule(LightningDataModule):
    """Chats to learn from, chats to validate on, and text to measure forgetting on.

    Args:
        train_path: chats (or plain text) to train on: a file, a list, a glob or a folder; `.jsonl` or `.jsonl.gz`.
        tokenizer: folder with `tokenizer.json` and the chat template (`tokenizer_config.json`).
        val_path: chats to validate on.
        pretrain_path: the text that the base was pretrained on; measures forgetting where there is no `heldout_path`,
            and gives the size for `max_ratio`.
        heldout_path: pretraining text that the base has not seen; measures forgetting.
        max_mb: train on at most this many MB (of 1024 * 1024 bytes) of lines, drawn with `seed`; null for all of them.
        max_ratio: train on at most this share of the pretraining text's bytes (the rule of thumb is 0.001 to 0.0001).
        pretrain_mb: MB of pretraining text, where `pretrain_path` is not at hand.
        seed: of the sample, of the order in every epoch, and of what is drawn per conversation.
        max_length: tokens after which a document is cut.
        batch_size: conversations per micro-batch.
        max_tokens_per_batch: most tokens in one micro-batch, which bounds memory; null for no bound.
        empty_think_ratio: share of the conversations that keep the template's empty think blocks, drawn every epoch.
        shuffle: train in a new order every epoch; else in the order of the sample, every time.
        max_bad_ratio: refuse to start when more than this share of the lines cannot be used.
        max_overlap: refuse held-out documents that share more than this share of their 50-character shingles with the
            training chats.
        measure_documents: documents of pretraining text to measure on, chosen by content hash.
        format: of the lines: auto, or one of the formats in the README.
        document_format: how pretraining framed a raw text: minimind3, minimind2 (the markers are in the text) or bare.
        probes_path: facts to ask before and after training, see `probes.py`.
        cache_dir: where tokenized stores are kept; null for the user's cache folder.

    Raises:
        ValueError: with file, line, value and remedy, before anything is trained.
    """

    def __init__(
        self,
        train_path: str | list[str],
        tokenizer: str,
        val_path: str | list[str] | None = None,
        pretrain_path: str | list[str] | None = None,
        heldout_path: str | list[str] | None = None,
        max_mb: float | None = 72.0,
        max_ratio: float | None = None,
        pretrain_mb: float | None = None,
        seed: int = 42,
        max_length: int = 768,
        batch_size: int = 16,
        max_tokens_per_batch: int | None = None,
        empty_think_ratio: float = 0.2,
        shuffle: bool = True,
        max_bad_ratio: float = 0.01,
        max_overlap: float = 0.2,
        measure_documents: int = 1_000,
        format: str = "auto",
        document_format: str = "minimind3",
        probes_path: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.train_path, self.val_path = train_path, val_path
        self.pretrain_path, self.heldout_path = pretrain_path, heldout_path
        self.max_mb, self.max_ratio, self.pretrain_mb = max_mb, max_ratio, pretrain_mb
        self.seed, self.max_length, self.batch_size = seed, max_length, batch_size
        self.max_tokens_per_batch, self.shuffle = max_tokens_per_batch, shuffle
        self.empty_think_ratio = empty_think_ratio
        self.max_bad_ratio, self.max_overlap, self.measure_documents = max_bad_ratio, max_overlap, measure_documents
        self.format, self.document_format = format, document_format
        self.cache = Path(cache_dir) if cache_dir else default_cache()
        self.files = Files(self.cache)
        self.probes = self.files.expand(probes_path, "data.probes_path")[0] if probes_path else None
        self.template = ChatTemplate.from_folder(resolve(tokenizer))
        self.start_step = 0  # optimizer steps done before this process started; set on resume
        self._stores: dict[str, Store] = {}

    # ---- stores: selected, tokenized, cached

    def prepare_data(self) -> None:
        """Select and tokenize what is not in the cache yet (one process per machine)."""
        self._open()

    def setup(self, stage: str) -> None:
        """Open the stores; `fit` also plans the windows."""
        self._stores = self._open()
        self.evaluation = {
            name: Documents(self._stores[name], max_length=self.max_length)
            for name in (CHAT, PRETRAIN)
            if name in self._stores
        }
        if stage == "fit":
            assert self.trainer is not None
            self.plan = Plan(
                Documents(self.train_store, max_length=self.max_length),
                batch_size=self.batch_size,
                accumulate=self.trainer.accumulate_grad_batches,
                ranks=self.trainer.world_size,
                seed=self.seed,
                shuffle=self.shuffle,
                empty_think_ratio=self.empty_think_ratio,
                max_tokens_per_batch=self.max_tokens_per_batch,
            )
            if self.max_tokens_per_batch is not None:  # a later epoch must not fail after hours
                for epoch in range(max(1, self.trainer.max_epochs or 1)):
                    self.plan.epoch(epoch)

    @property
    def train_store(self) -> Store:
        return self._stores["train"]

    @property
    def seen(self) -> bool | None:
        """Whether the base has seen the text that forgetting is measured on; None where nothing is measured."""
        return self.heldout_path is None if PRETRAIN in self._stores else None

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
    def cap_mb(self) -> float | None:
        """The cap on the sample, in MB: the tighter of `max_mb` and `max_ratio`."""
        if self.max_ratio is None:
            return self.max_mb
        if self.pretrain_bytes is None:
            raise ValueError(
                "data.max_ratio needs the size of the pretraining text: set data.pretrain_path or data.pretrain_mb"
            )
        by_ratio = self.max_ratio * self.pretrain_bytes / MEBIBYTE
        return by_ratio if self.max_mb is None else min(self.max_mb, by_ratio)

    def _open(self) -> dict[str, Store]:
        stores = {}
        assert self.trainer is not None
        if self.trainer.state.fn == "fit":
            stores["train"] = self._train_store()
        if self.val_path is not None:
            stores[CHAT] = self._whole_store("val_path", self.val_path)
        measured = ("heldout_path", self.heldout_path) if self.heldout_path else ("pretrain_path", self.pretrain_path)
        if measured[1] is not None:
            stores[PRETRAIN] = self._measure_store(measured[0], measured[1])
            if self.heldout_path is not None and "train" in stores:
                self._refuse_overlap(stores)
        return stores

    def _train_store(self) -> Store:
        files, cap = self.files.expand(self.train_path, "data.train_path"), self.cap_mb

        def make(folder: Path) -> None:
            selection = select(files, max_mb=cap, seed=self.seed)
            selection.require_some()
            with track("tokenizing the chats", total=selection.selected) as progress:
                # everything: the order of the sample means nothing, so the files' own order is kept
                lines = read_lines(files) if cap is None else selection.lines()
                corpus.build(folder, lines, progress=progress, note=selection.manifest, **self._tokenization)

        store = corpus.open_or_build(self.cache, self._key("train", files, max_mb=cap, seed=self.seed), make)
        return self._checked(store, "data.train_path")

    def _whole_store(self, name: str, paths: str | list[str]) -> Store:
        files = self.files.expand(paths, f"data.{name}")

        def make(folder: Path) -> None:
            with track(f"tokenizing data.{name}") as progress:
                corpus.build(folder, read_lines(files), progress=progress, **self._tokenization)

        return self._checked(corpus.open_or_build(self.cache, self._key("whole", files), make), f"data.{name}")

    def _measure_store(self, name: str, paths: str | list[str]) -> Store:
        files = self.files.expand(paths, f"data.{name}")

        def make(folder: Path) -> None:
            with track(f"tokenizing data.{name}") as progress:
                lines = choose_by_hash(read_lines(files), self.measure_documents)
                corpus.build(folder, lines, progress=progress, **self._tokenization)

        key = self._key("measure", files, documents=self.measure_documents)
        return self._checked(corpus.open_or_build(self.cache, key, make), f"data.{name}")

    @property
    def _tokenization(self) -> dict[str, Any]:
        return {"template": self.template, "format": self.format, "document_format": self.document_format}

    def _key(self, kind: str, files: list[Path], **more: Any) -> dict[str, Any]:
        return {
            "kind": kind,
            "files": [[str(path), self.files.facts(path).sha256] for path in files],
            "tokenizer": self.template.fingerprint,
            "format": [self.format, self.document_format],
            **more,
        }

    def _checked(self, store: Store, key: str) -> Store:
        bad = sum(store.rejected.values())
        lines = bad + len(store)
        if lines == 0:
            raise ValueError(f"{key}: no line in {', '.join(store.meta['files']) or 'the files'}; nothing to use")
        if bad > self.max_bad_ratio * lines:
            counts = ", ".join(f"{count} {reason}" for reason, count in store.rejected.items())
            first = next(store.rejections())
            raise ValueError(
                f"{key}: {bad} of {lines} lines cannot be used ({counts}), more than data.max_bad_ratio = "
                f"{self.max_bad_ratio:g} allows. The first: {first['file']}:{first['line']}: {first['detail']}. "
                "Correct these lines, or raise data.max_bad_ratio"
            )
        return store

    def _refuse_overlap(self, stores: dict[str, Store]) -> None:
        train, held_out = stores["train"], stores[PRETRAIN]
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

    # ---- what a checkpoint has to agree on

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which documents come in which window."""
        return {
            "sample": self.train_store.folder.name,
            "documents": len(self.plan.documents),
            "window_size": self.plan.window_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "max_length": self.max_length,
            "empty_think_ratio": self.empty_think_ratio,
        }

    def check_identity(self, saved: dict[str, Any]) -> None:
        """Refuse to resume on another plan.

        Raises:
            ValueError: naming every difference.
        """
        now = self.identity
        changed = [
            f"{name} was {saved.get(name)}, is {value}" for name, value in now.items() if saved.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"cannot resume: the checkpoint's data differs ({'; '.join(changed)}). `sample` stands for the files, "
                "data.max_mb, data.seed and the tokenizer; `window_size` is batch_size x accumulate_grad_batches x "
                "ranks. Restore these settings, or start a new run from the checkpoint with model.weights"
            )

    # ---- loaders

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Micro-batches of this rank; the sampler starts where a resumed run has to go on."""
        assert self.trainer is not None
        epoch, window = divmod(self.start_step, self.plan.windows)
        sampler = _Positions(
            len_epoch=self.plan.windows * self.plan.accumulate, start=(epoch, window * self.plan.accumulate)
        )
        return _loader(_MicroBatches(self.plan, self.trainer.global_rank), sampler)

    def val_dataloader(self) -> list[DataLoader[MicroBatch]]:
        """One loader per entry of `evaluation`; every document goes to exactly one rank."""
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        token_bytes = bytes_of_tokens(self.template)
        return [
            _loader(
                EvaluationBatches(
                    documents,
                    token_bytes=token_bytes,
                    empty_think_ratio=self.empty_think_ratio,
                    seed=self.seed,
                    rank=rank,
                    ranks=ranks,
                )
            )
            for documents in self.evaluation.values()
        ]

    def predict_dataloader(self) -> DataLoader[list[dict[str, Any]]]:
        """Prompts of the validation chats (up to the last answer), `batch_size` together, with the reference answer."""
        if self.val_path is None:
            raise ValueError("predict answers the chats of data.val_path, which is not set")
        return DataLoader(list(self._prompts()), batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def sample_prompts(self, count: int) -> list[dict[str, Any]]:
        """The first prompts of the validation chats; see `prompts`."""
        return list(itertools.islice(self._prompts(), count)) if self.val_path is not None else []

    def _prompts(self) -> Iterator[dict[str, Any]]:
        assert self.val_path is not None
        return prompts(read_lines(self.files.expand(self.val_path, "data.val_path")), self.template, self.max_length)


def choose_by_hash(lines: Iterator[Line], count: int) -> list[Line]:
    """The `count` lines whose content hash is smallest: the same ones however the file is ordered or grows
    elsewhere."""

    def keyed() -> Iterator[tuple[bytes, int, Line]]:
        for number, line in enumerate(lines):
            yield hashlib.blake2b(line.text.encode(), digest_size=8).digest(), number, line

    return [line for _, _, line in heapq.nsmallest(count, keyed())]


def _loader(dataset: Dataset[MicroBatch], sampler: Sampler[Any] | None = None) -> DataLoader[MicroBatch]:
    return DataLoader(dataset, batch_size=None, sampler=sampler, pin_memory=torch.cuda.is_available())


class _MicroBatches(Dataset[MicroBatch]):
    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank

    def __len__(self) -> int:
        return self.plan.windows * self.plan.accumulate

    def __getitem__(self, index: tuple[int, int]) -> MicroBatch:
        epoch, position = index
        return self.plan.micro_batch(epoch, position, self.rank)


class _Positions(Sampler[tuple[int, int]]):
    """(epoch, position) of every micro-batch; Lightning calls `set_epoch`, and counts on the length of a whole
    epoch."""

    def __init__(self, *, len_epoch: int, start: tuple[int, int]) -> None:
        self.len_epoch, self.start = len_epoch, start
        self.epoch = start[0]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.len_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.start[1] if self.epoch == self.start[0] else 0
        for position in range(first, self.len_epoch):
            yield self.epoch, position
