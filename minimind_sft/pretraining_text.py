"""The base's pretraining text: what forgetting is measured on, and what is replayed, no document in both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_sft.corpus import Store
from minimind_sft.dealing import choose_by_hash, without
from minimind_sft.progress import track
from minimind_sft.sampling import Line, read_lines
from minimind_sft.selection import MEBIBYTE
from minimind_sft.store_maker import Build, StoreMaker

SEEN, UNSEEN, SELF_WRITTEN = "seen", "unseen", "self-written"  # what text to measure on is to the base
NO_TEXT = "data.replay_ratio, model.fisher_tokens and model.prior_tokens to 0 (without model.terms that read text)"


@dataclass(frozen=True)
class PretrainingText:
    """The settings are those of `data.SFTDataModule`, by the same names.

    Without `heldout_path`, documents to measure on are taken from `pretrain_path` itself: those with the smallest
    hashes. Where it is then read or replayed as well, `halve` leaves at least as much of it for that.
    """

    maker: StoreMaker
    pretrain_path: str | list[str] | None
    heldout_path: str | list[str] | None
    pretrain_mb: float | None
    measure_documents: int
    replay_documents: int

    @property
    def kind(self) -> str | None:
        """Whether the base has seen what is measured on (`SEEN`, `UNSEEN`); None where there is no text."""
        if self.heldout_path is not None:
            return UNSEEN
        return None if self.pretrain_path is None else SEEN

    @property
    def size(self) -> int | None:
        """Bytes of `pretrain_path`, uncompressed; None where nothing tells."""
        if self.pretrain_mb is not None:
            return int(self.pretrain_mb * MEBIBYTE)
        if self.pretrain_path is None:
            return None
        return sum(facts.text_bytes for facts in self.maker.files.facts(self._files("pretrain_path")))

    def measured(self, *, halve: bool) -> Store | None:
        """Documents to measure on; None where there is no text."""
        setting = "pretrain_path" if self.heldout_path is None else "heldout_path"
        files = self._files(setting)
        if not files:
            return None
        known = [] if self.heldout_path is None else self._files("pretrain_path")

        def fill(build: Build) -> None:
            with track(f"tokenizing data.{setting}") as progress:
                if self.heldout_path is None:
                    chosen = self._dealt(read_lines(files), halve)[0]
                else:
                    chosen = choose_by_hash(read_lines(files), self.measure_documents)
                if not chosen:
                    raise ValueError(f"data.{setting}: no line in {', '.join(map(str, files))}; nothing to measure on")
                unseen = without(chosen, read_lines(known))
                note = {"in_pretrain": len(chosen) - len(unseen)}
                if not unseen:
                    raise ValueError(
                        "data.heldout_path: every document also stands in data.pretrain_path, so none is unseen. Set "
                        "data.heldout_path to null, or to text that the base has not seen"
                    )
                build(unseen, progress=progress, note=lambda _: note)

        facts = {"documents": self.measure_documents, "known": self.maker.hashes(known)}
        store = self.maker.open("measure", files, fill, **facts, **self._halves(halve))
        return self.maker.checked(store, f"data.{setting}")

    def replayed(self, *, halve: bool) -> Store:
        """Documents to replay and to read, none of them measured on.

        Raises:
            ValueError: where there is no such text.
        """
        if self.pretrain_path is None:
            raise ValueError(
                "data.replay_ratio, or a term that reads text, asks for text to replay, but data.pretrain_path is not "
                "set. Set it to the text that the base was pretrained on (a part of it is enough), data.replay_source "
                f"to auto to let the base write it, or {NO_TEXT}"
            )
        files, held_out = self._files("pretrain_path"), self._files("heldout_path")

        def fill(build: Build) -> None:
            with track("tokenizing the text to replay") as progress:
                if held_out:
                    chosen = choose_by_hash(read_lines(files), self.replay_documents)
                else:
                    chosen = self._dealt(read_lines(files), halve)[1]
                build(without(chosen, read_lines(held_out)), progress=progress)

        facts = {
            "documents": self.replay_documents,
            "measured": 0 if held_out else self.measure_documents,
            "held_out": self.maker.hashes(held_out),
        }
        store = self.maker.open("replay", files, fill, **facts, **self._halves(halve))
        if not len(store) and not store.rejected:
            raise ValueError(
                "there is no text to replay or to read: data.pretrain_path has no document that is not measured on. "
                f"Give more text, set data.replay_source to self to let the base write it, or {NO_TEXT}"
            )
        return self.maker.checked(store, "data.pretrain_path")

    def _files(self, setting: str) -> list[Path]:
        paths = getattr(self, setting)
        return [] if paths is None else self.maker.files.expand(paths, f"data.{setting}")

    def _halves(self, halve: bool) -> dict[str, Any]:
        """For the name of a store: one of a whole text keeps the name that it always had."""
        return {"halves": True} if halve and self.heldout_path is None else {}

    def _dealt(self, lines: Iterable[Line], halve: bool) -> tuple[list[Line], list[Line]]:
        """Of one text: what is measured on, those with the smallest hashes, and what is replayed."""
        chosen = choose_by_hash(lines, self.measure_documents + max(self.measure_documents, self.replay_documents))
        measured = self.measure_documents
        if halve:
            measured = min(measured, (len(chosen) + 1) // 2)
        return chosen[:measured], chosen[measured : measured + self.replay_documents]
