"""Text and chats that the base writes itself, to measure on or to replay where there are no others.

All is drawn from the base at temperature 1, so its tokens follow the base's own distribution. On such text the rise of
the loss is a sample of KL(base || model), 0 for the base and above 0 in the mean for any other model: what is forgotten
where the base goes by itself (replay of self-written text: arXiv 2403.01244, arXiv 2509.04259). What the base knows but
seldom says is measured seldom, so text of its pretraining is worth more where there is some.

A chat is written from the user's header on: what a user might say, then the answer (arXiv 2406.08464). Only a model
that learned to chat has chats of its own to forget; `Author.chats` says how that is told.

Everything is written once, in batches, and kept in the cache under the base, the tokenizer and the seed. On one core, a
base of 5 M parameters writes 1,400 tokens a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from minimind_sft import corpus
from minimind_sft.chat import DOCUMENT_FRAMES, ChatTemplate, Span
from minimind_sft.corpus import Store
from minimind_sft.generate import generate
from minimind_sft.model import Transformer
from minimind_sft.progress import track
from minimind_sft.sampling import Line

TOGETHER = 64  # documents written at once
STREAMS = {"replay": 0, "measured": 1 << 31, "user": 1 << 32, "answer": 1 << 33}  # added to the seed
CHATS, TRIED = 64, 16  # own chats of a chat model; those by which it is told
TEXT_TOKENS, USER_TOKENS, ANSWER_TOKENS = 512, 96, 256  # at most: a base that never ends must not write for hours
SOURCE = "the base"  # where a file's name would stand

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Author:
    """A base that writes, the same every time.

    Attributes:
        cache: folder of all stores.
        model: the base.
        template: its tokenizer and chat template.
        base_sha256: of its file.
        max_length: tokens of a document or chat at most; bounded further by `TEXT_TOKENS` and its like.
        seed: of what is drawn.
        device: on which to write; the model is put back afterwards.
    """

    cache: Path
    model: Transformer
    template: ChatTemplate
    base_sha256: str
    max_length: int
    seed: int
    device: torch.device

    def texts(
        self,
        purpose: Literal["measured", "replay"],
        *,
        documents: int,
        tokens: int | None = None,
        document_format: str,
        apart_from: Store | None = None,
    ) -> Store:
        """Documents by the base, from the cache or written now; those without any text are left out.

        Args:
            purpose: what they are for; each has draws of its own.
            documents: how many to write at most.
            tokens: begin no more documents once there are as many tokens; None for no such bound.
            document_format: how pretraining framed a text.
            apart_from: leave out what also stands here, by content hash.

        Raises:
            ValueError: a tokenizer without a token that opens a document.
        """
        opens = self.template.opening_id(document_format, self.model.config.vocab_size)
        if opens is None:
            raise ValueError(
                "the base cannot write text: its tokenizer has no token that opens a document of data.document_format "
                f"{document_format}. Give its pretraining text (pretrain_path), or let it write none (own_documents 0; "
                "in `fit` data.replay_ratio and model.fisher_tokens 0 as well)"
            )
        last = self.template.token_id(DOCUMENT_FRAMES[document_format][1])
        stops = {id for id in (last, *self.template.stop_ids) if id is not None}
        most = min(TEXT_TOKENS, self.max_length)

        def write(progress: Progress) -> Iterator[list[Span]]:
            begun, total = 0, 0
            while begun < documents and (tokens is None or total < tokens):
                count = min(TOGETHER, documents - begun)
                for ids in self._continue([[opens]] * count, most - 1, purpose, stops, begun):
                    if _said(self.template, ids, but=self.template.control_ids).strip():
                        total += 1 + len(ids)
                        yield [Span([opens], False), Span(ids, True)]
                begun += count
                progress(min(total, tokens) if tokens else begun)

        key: dict[str, Any] = {"purpose": purpose, "format": document_format, "blank": "without control tokens"}
        key |= {"tokens": tokens, "documents": documents}
        what = {"measured": "text to measure on", "replay": "text to replay"}[purpose]
        return self._store(what, key, write, total=tokens or documents, apart_from=apart_from)

    def chats(self, wanted: int | Literal["auto"]) -> Store | None:
        """Chats by the base, from the cache or written now; only the answers are supervised.

        Args:
            wanted: how many; 0 for none; `auto` for `CHATS` where the base is a chat model, else for none. It is one
                where at least half of `TRIED` answers end by themselves and, asked for more, it goes on as its template
                does behind a turn (in MiniMind with a newline behind `<|im_end|>`). Measured: 0 and 2 of 16 by bases of
                1.7 M and 5 M parameters, 16 and 15 by their fine-tunes; that an answer ends would not tell, for the
                smaller base ends all its texts.

        Raises:
            ValueError: a number of chats, and a template that the base cannot begin one with.
        """
        if wanted == "auto":
            if self._no_chats():
                return None
            tried = self._chats(TRIED)
            with self._at_work():
                taught = sum(self._ends_as_taught(tried.document(number)[0].tolist()) for number in range(len(tried)))
            return self._chats(CHATS) if 2 * taught >= TRIED else None
        if wanted and (why := self._no_chats()):
            raise ValueError(f"the base cannot write chats: {why}. Set data.own_chats to 0")
        return self._chats(wanted) if wanted else None

    def _no_chats(self) -> str | None:
        """Why the base cannot begin a chat, if it cannot."""
        try:
            header, turn = self.template.around_user()
        except ValueError as error:
            return str(error)
        new = [id for id in header + turn if id >= self.model.config.vocab_size]
        return f"it does not know the token {self.template.decode(new[:1])!r} of the chat template" if new else None

    def _chats(self, count: int) -> Store:
        header, turn = self.template.around_user()
        user, answer = min(USER_TOKENS, self.max_length // 4), min(ANSWER_TOKENS, self.max_length // 2)

        def write(progress: Progress) -> Iterator[list[Span]]:
            stops = set(self.template.stop_ids)
            for begun in range(0, count, TOGETHER):
                heads = [header] * min(TOGETHER, count - begun)
                said = self._continue(heads, user, "user", stops, begun)
                asked = [header + [id for id in ids if id not in stops] + turn for ids in said]
                answers = self._continue(asked, answer, "answer", stops, begun)
                yield from ([Span(a, False), Span(b, True)] for a, b in zip(asked, answers, strict=True))
                progress(begun + len(heads))

        return self._store("chats", {"purpose": "chats", "documents": count}, write, total=count)

    def _ends_as_taught(self, chat: list[int]) -> bool:
        """Whether an answer came to its end, and the base would then go on as the template does."""
        end = self.template.tokenizer.encode(self.template.turns.end, add_special_tokens=False).ids
        rest = next((end[place + 1 :] for place, id in enumerate(end) if id in self.template.stop_ids), [])
        if chat[-1] not in self.template.stop_ids:
            return False
        return generate(self.model, [chat], max_new_tokens=len(rest)) == [rest]

    def _continue(
        self, prompts: list[list[int]], most: int, stream: str, stops: set[int], begun: int
    ) -> list[list[int]]:
        return generate(
            self.model,
            prompts,
            max_new_tokens=most,
            temperature=1.0,
            seed=self.seed + STREAMS[stream] + begun,
            stop_ids=stops,
            vocab_size=self.template.vocab_size,
        )

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """With the model on the device."""
        home = self.model.lm_head.weight.device
        self.model.to(self.device)
        try:
            yield
        finally:
            self.model.to(home)

    def _store(
        self,
        what: str,
        key: dict[str, Any],
        write: Callable[[Progress], Iterator[list[Span]]],
        *,
        total: int,
        apart_from: Store | None = None,
    ) -> Store:
        def make(folder: Path) -> None:
            started = time.monotonic()
            print(f"the base writes {what} ...", flush=True)
            with self._at_work(), track(f"the base writes {what}", total=total) as progress:
                corpus.build_from_spans(
                    folder, write(progress), self.template.vocab_size, source=SOURCE, apart_from=apart_from
                )
            made = Store(folder)
            print(
                f"the base wrote {what}: {len(made):,} documents, {len(made.ids):,} tokens, "
                f"{time.monotonic() - started:.1f} s, kept in the cache",
                flush=True,
            )

        key = {
            "kind": "self_written",
            "base": self.base_sha256,
            "model": asdict(self.model.config),  # what a file leaves open, such as the number of heads, as well
            "tokenizer": self.template.fingerprint,
            "max_length": self.max_length,
            "seed": self.seed,
            "most": [TEXT_TOKENS, USER_TOKENS, ANSWER_TOKENS],
            "apart_from": apart_from and apart_from.folder.name,
            **key,
        }
        return corpus.open_or_build(self.cache, key, make)


def lines(store: Store, template: ChatTemplate, *, document_format: str) -> Iterator[Line]:
    """Self-written texts as the lines of a file, for what reads those; markers stay only where files hold them."""
    keep = document_format == "minimind2"
    for number in range(len(store)):
        ids = store.document(number)[0].tolist()
        text = _said(template, ids, but=[] if keep else template.control_ids)
        yield Line(SOURCE, int(store.line_numbers[number]), json.dumps({"text": text}, ensure_ascii=False))


def _said(template: ChatTemplate, ids: list[int], *, but: Sequence[int]) -> str:
    return template.decode([id for id in ids if id not in but])
