"""The LightningDataModule: train chats, validation chats, and the pretraining text that forgetting is measured on.

What comes in are files and the settings below; what goes out are loaders of micro-batches. Selecting and tokenizing
happen once, in `prepare_data` (`stores.py`). Order, cuts and draws are a plan (`windows.Plan`), a pure function of
(seed, epoch), so that there is no position to save: a resumed run derives it from the number of optimizer steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from minimind_sft.batching import MicroBatch
from minimind_sft.corpus import Store
from minimind_sft.documents import Documents
from minimind_sft.evaluation import EvaluationBatches, bytes_of_tokens, drawn, prompts
from minimind_sft.forgetting import CHAT, OWN_CHATS, PRETRAIN
from minimind_sft.loading import MicroBatches, Positions, loader
from minimind_sft.origins import replays_own
from minimind_sft.pretraining_text import SELF_WRITTEN
from minimind_sft.ranges import check_ranges
from minimind_sft.replay import ReplayStream
from minimind_sft.replay_chat import ChatFrame
from minimind_sft.report import rejected
from minimind_sft.self_written import Author
from minimind_sft.stores import Opened, Stores
from minimind_sft.windows import Plan

if TYPE_CHECKING:
    from minimind_sft.module import SFTModule

MEASURED_ON = {
    CHAT: "validation chats (data.val_path or data.val_fraction)",
    PRETRAIN: "documents of text (data.heldout_path, or data.pretrain_path)",
    OWN_CHATS: "chats by the base (data.own_chats)",
}


class SFTDataModule(LightningDataModule):
    """Chats to learn from, chats to validate on, and text to measure forgetting on.

    Args:
        train_path: chats (or plain text) to train on: a file, a list, a glob or a folder; `.jsonl` or a `.json` array,
            both plain, `.gz` or `.zst`, or `.parquet`. Sizes count the lines, elements or rows, not the file. An entry
            of a list may be {path: ..., max_mb: 8, weight: 2}: no more than 8 MB of it, and twice as many bytes of the
            sample as of a source of weight 1; one that runs out leaves its share to the others.
        tokenizer: folder with `tokenizer.json` and the chat template (`tokenizer_config.json`).
        val_path: chats to validate on.
        pretrain_path: the text that the base was pretrained on; measures forgetting where there is no `heldout_path`,
            and gives the size for `max_ratio`.
        heldout_path: pretraining text that the base has not seen; measures forgetting.
        val_fraction: validate on this share of the training chats, by content hash; excludes `val_path`.
        max_mb: train on at most this many MB (of 1024 * 1024 bytes) of lines, drawn with `seed`; null for all of them.
        max_ratio: train on at most this share of the pretraining text's bytes (the rule of thumb is 0.001 to 0.0001).
        max_rows: train on at most this many lines. Of several caps the tightest wins.
        max_tokens: train on at most this many tokens, of whole documents in the order of the sample, each counted up to
            `max_length`, until one would pass it.
        pretrain_mb: MB of pretraining text, where `pretrain_path` is not at hand.
        seed: of the sample, of the order in every epoch, and of what is drawn per conversation.
        max_length: most tokens of a document.
        too_long: what becomes of a longer one: truncate_right, truncate_turns (whole turns from the end),
            truncate_left, drop or error.
        supervise: learn all answers of a chat, or the last. A message with `train` false is never learned.
        supervise_reasoning: learn think blocks, too; false: they are context.
        system_prompts: prompts to put in front of chats that have none: a file with one a line, or a list.
        system_ratio: share of the chats without a system prompt and tools that get one, drawn every epoch.
        batch_size: conversations per micro-batch.
        max_tokens_per_batch: most tokens in one micro-batch, which bounds memory; null for no bound.
        empty_think_ratio: share of the conversations that keep the template's empty think blocks, drawn every epoch.
        shuffle: train in a new order every epoch; else in the order of the sample, every time.
        max_bad_ratio: refuse to start when more than this share of the lines cannot be used.
        max_overlap: refuse held-out documents that share more than this share of their 50-character shingles with the
            training chats, and do not replay a document that shares more with one that is measured on; 1 allows all.
        measure_documents: documents of pretraining text to measure on, chosen by content hash; where it is replayed as
            well, no more than half of them.
        own_documents: without `pretrain_path` and `heldout_path`, measure forgetting on this many documents that the
            base writes itself first; 0 for no such measuring.
        own_chats: measure the forgetting of this many chats that the base writes itself, too; auto for 64 where it is a
            chat model (see `self_written.Author.chats`), else none; 0 for none.
        replay_ratio: tokens of `pretrain_path` per token of chat that every window holds besides, none of them
            measured on; 0 is off. What is asked of them: `model.replay_loss`.
        replay_source: `file`, to replay `pretrain_path`; `self`, to replay text that the base writes itself first;
            `auto`, to replay `pretrain_path` where it is set.
        replay_length: tokens of a piece, at most, that documents are replayed in: the shorter, the more subjects in
            every step; null to replay whole documents.
        replay_in_chat: share of these pieces that are replayed in the chat template, as the rest of a text that a user
            begins, where the model is held to what the base says of the same tokens without a chat.
        replay_documents: documents to replay from, at most; of `pretrain_path` chosen by content hash.
        format: of the lines: auto, or one of the formats in the README.
        document_format: how pretraining framed a raw text: minimind3, minimind2 (the markers are in the text), qwen3,
            llama3 or bare, see `chat.DOCUMENT_FRAMES`.
        probes_path: facts to ask before and after training (prompt, answer, distractors, question), see `probes.py`.
        cache_dir: where tokenized stores are kept; null for the user's cache folder.
        workers: processes that tokenize, where it takes over a second; null for one per core, 16 at most.

    Raises:
        ValueError: with file, line, value and remedy, before anything is trained.
    """

    def __init__(
        self,
        train_path: str | list[str | dict[str, Any]],
        tokenizer: str,
        val_path: str | list[str] | None = None,
        val_fraction: float | None = None,
        pretrain_path: str | list[str] | None = None,
        heldout_path: str | list[str] | None = None,
        max_mb: float | None = 72.0,
        max_ratio: float | None = None,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        pretrain_mb: float | None = None,
        seed: int = 42,
        max_length: int = 768,
        too_long: str = "truncate_right",
        supervise: str = "all",
        supervise_reasoning: bool = True,
        system_prompts: str | list[str] | None = None,
        system_ratio: float = 0.2,
        batch_size: int = 16,
        max_tokens_per_batch: int | None = None,
        empty_think_ratio: float = 0.2,
        shuffle: bool = True,
        max_bad_ratio: float = 0.01,
        max_overlap: float = 0.2,
        measure_documents: int = 1_000,
        own_documents: int = 200,
        own_chats: int | Literal["auto"] = "auto",
        replay_ratio: float = 0.0,
        replay_source: Literal["auto", "file", "self"] = "auto",
        replay_documents: int = 20_000,
        replay_length: int | None = None,
        replay_in_chat: float = 0.0,
        format: str = "auto",
        document_format: str = "minimind3",
        probes_path: str | None = None,
        cache_dir: str | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.seed, self.max_length, self.batch_size = seed, max_length, batch_size
        self.too_long, self.system_ratio = too_long, system_ratio
        self.max_tokens_per_batch, self.shuffle = max_tokens_per_batch, shuffle
        self.empty_think_ratio, self.document_format = empty_think_ratio, document_format
        check_ranges(
            "data",
            system_ratio=system_ratio,
            empty_think_ratio=empty_think_ratio,
            replay_ratio=replay_ratio,
            replay_in_chat=replay_in_chat,
            own_documents=own_documents,
            own_chats=own_chats,
        )
        self.replay_length, self.replay_in_chat = replay_length, replay_in_chat
        self.own_documents, self.own_chats = own_documents, own_chats
        self.replay_ratio, self.replay_documents = replay_ratio, replay_documents
        self.replays_own = replays_own(replay_source, pretrain_path)
        self.stores = Stores(
            train_path=train_path,
            tokenizer=tokenizer,
            val_path=val_path,
            val_fraction=val_fraction,
            pretrain_path=pretrain_path,
            heldout_path=heldout_path,
            max_mb=max_mb,
            max_ratio=max_ratio,
            max_rows=max_rows,
            max_tokens=max_tokens,
            pretrain_mb=pretrain_mb,
            seed=seed,
            max_length=max_length,
            too_long=too_long,
            supervise=supervise,
            supervise_reasoning=supervise_reasoning,
            system_prompts=system_prompts,
            max_bad_ratio=max_bad_ratio,
            max_overlap=max_overlap,
            measure_documents=measure_documents,
            replay_documents=replay_documents,
            format=format,
            document_format=document_format,
            probes_path=probes_path,
            cache_dir=cache_dir,
            workers=workers,
        )
        self.template, self.probes = self.stores.template, self.stores.probes
        self.start_step = 0  # optimizer steps done before this process started; set on resume

    def prepare_data(self) -> None:
        """Select and tokenize what is not in the cache yet (one process per machine)."""
        self._open()

    def _open(self) -> Opened:
        """What there is in files, and what the base writes itself where there is nothing."""
        assert self.trainer is not None
        fitting, module = self.trainer.state.fn == "fit", self._module
        wants_text = fitting and (self._replays or self.reads_text)
        from_files = not self.replays_own
        halve = from_files and (self.replay_ratio > 0 or self.reads_text)  # whatever the verb: the same is measured on
        opened = self.stores.open(train=fitting, replay=wants_text and from_files, halve=halve)
        if module.from_scratch or self.trainer.state.fn == "predict":
            return opened
        author = self._author()
        if opened.measured is None and self.own_documents:
            measured = author.texts("measured", documents=self.own_documents, document_format=self.document_format)
            opened = opened._replace(measured=measured)
        if wants_text and self.replays_own:
            opened = opened._replace(replay=self._own_text(author, opened))
        return opened._replace(own_chats=author.chats(self.own_chats))

    def _own_text(self, author: Author, opened: Opened) -> Store:
        """Text by the base: as many tokens as an epoch replays, or are read before the first step."""
        tokens = self._module.tokens_to_read
        if self._replays:
            train = self.stores.documents(opened).train
            assert train is not None
            lengths, _ = train.sizes(np.ones(len(train), bool))
            tokens = max(tokens, int(self.replay_ratio * lengths.sum()))
        return author.texts(
            "replay",
            documents=self.replay_documents,
            tokens=tokens,
            document_format=self.document_format,
            apart_from=opened.measured,
        )

    def _author(self) -> Author:
        assert self.trainer is not None and self._module.start.sha256 is not None
        return Author(
            cache=self.stores.cache,
            model=self._module.base,
            template=self.template,
            base_sha256=self._module.start.sha256,
            max_length=self.max_length,
            seed=self.seed,
            device=self.trainer.strategy.root_device,
        )

    @property
    def _module(self) -> SFTModule:
        assert self.trainer is not None
        return self.trainer.lightning_module  # type: ignore[return-value]

    @property
    def text(self) -> str | None:
        """What the text that forgetting is measured on is to the base: `seen`, `unseen`, `self-written`; None for no
        text."""
        own = self.own_documents and not self._module.from_scratch
        return self.stores.text.kind or (SELF_WRITTEN if own else None)

    @property
    def _replays(self) -> bool:
        """Whether there is text to replay, and a base whose text it is."""
        module = self._module
        return self.replay_ratio > 0.0 and module.holding.replay_weight > 0.0 and not module.from_scratch

    @property
    def reads_text(self) -> bool:
        """Whether text is read before the first step."""
        return self._module.tokens_to_read > 0

    def setup(self, stage: str) -> None:
        """Open the stores and deal their documents; `fit` also plans the windows."""
        assert self.trainer is not None
        opened = self._open()
        self.dealt = self.stores.documents(opened)
        own = None if opened.own_chats is None else Documents(opened.own_chats, max_length=self.max_length)
        named = ((CHAT, self.dealt.validation), (PRETRAIN, self.dealt.measured), (OWN_CHATS, own))
        self.evaluation = {name: documents for name, documents in named if documents is not None}
        for name, documents in self.evaluation.items():
            if not len(documents):
                raise ValueError(
                    f"none of the {MEASURED_ON[name]} can be measured on (rejected: {rejected(documents.rejected)}); "
                    "give others, or a larger data.max_length"
                )
        if stage == "validate" and not self.evaluation:
            raise ValueError(
                "there is nothing to validate on: set data.val_path (chats), data.heldout_path or data.pretrain_path "
                "(text), or data.own_documents, for text that the base writes"
            )
        if stage == "fit":
            assert self.dealt.train is not None
            self.spare_text = self.dealt.replay
            self.plan = Plan(
                self.dealt.train,
                batch_size=self.batch_size,
                accumulate=self.trainer.accumulate_grad_batches,
                ranks=self.trainer.world_size,
                seed=self.seed,
                shuffle=self.shuffle,
                empty_think_ratio=self.empty_think_ratio,
                system_ratio=self.system_ratio,
                max_tokens_per_batch=self.max_tokens_per_batch,
                replay=self._replay_stream(),
            )
            if self.max_tokens_per_batch is not None:  # a later epoch must not fail after hours
                for epoch in range(math.ceil(self._module.total_steps / self.plan.windows)):
                    self.plan.epoch(epoch)

    def _replay_stream(self) -> ReplayStream | None:
        if not self._replays:
            return None
        assert self.spare_text is not None
        frame, text = None, self.spare_text
        if self.replay_in_chat:
            frame = ChatFrame.of(self.template)
            room = max(2, self.max_length - frame.size)
            text = Documents(text.store, max_length=room, numbers=text.index)
        return ReplayStream(
            text,
            ratio=self.replay_ratio,
            seed=self.seed,
            piece_length=self.replay_length,
            frame=frame,
            in_chat=self.replay_in_chat,
        )

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        return bytes_of_tokens(self.template)  # once, for every look needs it

    @property
    def pretrain_bytes(self) -> int | None:
        """Bytes of pretraining text, uncompressed; None where nothing tells."""
        return self.stores.text.size

    # ---- loaders

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Micro-batches of this rank; the sampler starts where a resumed run has to go on."""
        assert self.trainer is not None
        micro_batches = MicroBatches(self.plan, self.trainer.global_rank)
        return loader(micro_batches, self.trainer.strategy.root_device, Positions(self.plan, self.start_step))

    def val_dataloader(self) -> list[DataLoader[MicroBatch]]:
        """One loader per entry of `evaluation`; every document goes to exactly one rank."""
        return self.evaluation_loaders(1.0)

    def evaluation_loaders(self, share: float, *, rest: bool = False) -> list[DataLoader[MicroBatch]]:
        """As `val_dataloader`, of a share of the documents, the same ones every time, or of the rest of them."""
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return [
            loader(
                EvaluationBatches(
                    documents,
                    token_bytes=self._token_bytes,
                    empty_think_ratio=self.empty_think_ratio,
                    seed=self.seed,
                    rank=rank,
                    ranks=ranks,
                    chosen=drawn(len(documents), share, self.seed, rest=rest),
                ),
                self.trainer.strategy.root_device,
            )
            for documents in self.evaluation.values()
        ]

    def predict_dataloader(self) -> DataLoader[list[dict[str, Any]]]:
        """Prompts of the validation chats (up to the last answer), `batch_size` together, with the reference answer;
        every rank has its share, see `predictions.py`."""
        assert self.trainer is not None
        found = list(self._prompts())
        if not found:
            raise ValueError("predict answers the chats of data.val_path or data.val_fraction; there are none")
        # with fewer prompts than ranks one is answered twice: a rank without any would never meet the others
        share = found[self.trainer.global_rank :: self.trainer.world_size] or found[:1]
        return DataLoader(share, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def sample_prompts(self, count: int) -> list[dict[str, Any]]:
        """The first prompts of the validation chats; see `prompts`."""
        return list(itertools.islice(self._prompts(), count))

    def _prompts(self) -> Iterator[dict[str, Any]]:
        lines = self.stores.validation_lines(self.dealt.validation)
        return prompts(lines, self.template, self.max_length, format=self.stores.format)
