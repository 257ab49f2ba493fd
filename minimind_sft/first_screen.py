"""The first screen of `fit`: what is about to happen, and the files that say so.

Runs as a Lightning callback because what it tells is known only once the data is open and the base was measured.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from minimind_sft import account, report
from minimind_sft.caps import RULE_OF_THUMB
from minimind_sft.checkpoints import Checkpoints
from minimind_sft.dealing import IN_MEASURED
from minimind_sft.evaluation import evaluation_tokens
from minimind_sft.files import write_whole
from minimind_sft.forgetting import CHAT, OWN_CHATS, PRETRAIN
from minimind_sft.identity import of_training
from minimind_sft.measuring import Measure
from minimind_sft.oddities import silent_answers
from minimind_sft.origins import is_run, tokenizer_sha256
from minimind_sft.pretraining_text import UNSEEN
from minimind_sft.rundir import discard_earlier
from minimind_sft.step_log import duration
from minimind_sft.token_texts import TokenTexts

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule
    from minimind_sft.module import SFTModule


class Record(Callback):
    """Writes `config.yaml`, `run.json`, `sample.json` and `rejected.jsonl` when a run begins.

    Args:
        folder: the run directory.
        config: the settings as YAML.
        command: the verb and its arguments.
    """

    def __init__(self, folder: Path, config: Callable[[], str], command: list[str]) -> None:
        self.folder, self.config, self.command = folder, config, command

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or pl_module.nothing_left and is_run(self.folder):
            return  # of a run that is over, the records are those of its last step
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = data.stores.tokenizer
        facts = {
            "command": self.command,
            "versions": {name: version(name) for name in ("torch", "lightning", "tokenizers", "numpy")}
            | {"python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "base": pl_module.start.description,
            "base_sha256": pl_module.start.sha256,
            "tokenizer": {"folder": str(tokenizer.absolute()), "sha256": tokenizer_sha256(tokenizer)},
            "data": of_training(data),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("config.yaml", self.config()),
            ("run.json", json.dumps(facts, indent=1, ensure_ascii=False)),
            ("sample.json", json.dumps(account.sums(data.dealt), indent=1, ensure_ascii=False)),
        ):
            write_whole(self.folder / name, text + "\n")
        rejections = (json.dumps(row, ensure_ascii=True) + "\n" for row in data.dealt.rejections())
        write_whole(self.folder / "rejected.jsonl", rejections)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:  # nothing can be refused any more
            discard_earlier(self.folder)


class FirstScreen(Callback):
    """Before training: what will be trained on what, and what the base is like."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            print(report.aligned(self._rows(trainer, pl_module)), flush=True)
            done, total = trainer.datamodule.start_step, pl_module.total_steps  # type: ignore[attr-defined]
            if pl_module.nothing_left:  # Lightning then skips training and its hooks
                print(f"nothing to train: the checkpoint is already at step {done:,} of {total:,}", flush=True)

    def _rows(self, trainer: pl.Trainer, pl_module: SFTModule) -> list[tuple[str, str]]:
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        intervals, total, windows = self.measure.intervals, pl_module.total_steps, data.plan.windows
        parameters = pl_module.model.num_parameters()
        learning = sum(p.numel() for p in pl_module.model.parameters() if p.requires_grad)
        trained = "all trained" if learning == parameters else f"{learning:,} trained"
        checkpoint = report.megabytes(pl_module.checkpoint_bytes)
        ranks = f" on {trainer.world_size} processes" if trainer.world_size > 1 else ""
        return [
            ("base", pl_module.start.description),
            (
                "parameters",
                f"{parameters:,}, {trained}, precision {trainer.precision}, {pl_module.device}{ranks}, "
                f"{pl_module.attention} attention",
            ),
            *_data_rows(data, pl_module),
            ("holding on", _holding(data, pl_module)),
            (
                "steps",
                f"{windows:,} per epoch, {total:,} in all; a step learns from {data.plan.window_size:,} documents, "
                f"{data.plan.epoch(0).window_tokens.mean():,.0f} tokens in the mean",
            ),
            ("learning rate", f"{pl_module.learning_rate:.3g} at its peak{_by_width(pl_module)}"),
            (
                "log, look, save",
                f"every {intervals.log_every}, {intervals.val_every} and {intervals.save_every} steps, and "
                f"after the last; "
                f"a look reads {evaluation_tokens(data.evaluation):,} tokens{_live(intervals.live_share)}",
            ),
            ("disk", f"last and best{_milestones(trainer, total)} of {checkpoint} in {trainer.default_root_dir}"),
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        if trainer.global_step:
            after = f"after step {trainer.global_step:,}; the next is {trainer.global_step + 1:,}"
            print(report.later_rows([("resumed", after)]), flush=True)
            return
        reading = self.measure.readings[0]
        if pl_module.from_scratch:
            print("from scratch: there is no base, so no baseline, no forgetting and nothing to hold on to", flush=True)
        rows = []
        if reading.chat_loss is not None:
            doubt = report.likely_not_its_tokenizer(reading.chat_loss, pl_module.model.config.vocab_size)
            doubt = f": {doubt} (data.tokenizer)" if doubt and not pl_module.from_scratch else ""
            rows.append(("chats now", f"{reading.chat_loss:.4f} nats per token{doubt}"))
        if reading.pretrain_loss is not None:
            rows.append(("text now", _text_line(reading.pretrain_loss, reading.chat_loss, pl_module, data)))
        elif not pl_module.from_scratch:
            what = "data.heldout_path, data.pretrain_path or data.own_documents"
            rows.append(("forgetting", f"not measured: set {what}"))
        if self.measure.base_is_known:
            rows.append(("", "as an earlier run of this base measured on the same documents"))
        tokens = evaluation_tokens(data.evaluation)
        if self.measure.seconds and tokens:
            # a token trained costs about as much as three looked at; so does one read for the basis
            trained = pl_module.total_steps * float(data.plan.epoch(0).window_tokens.mean())
            read_by_now = pl_module.from_scratch or pl_module.holding.prior is not None  # as any text for terms is
            to_read = 0 if read_by_now else pl_module.holding.tokens_of_basis(pl_module.model)
            looks = pl_module.total_steps / self.measure.intervals.val_every * self.measure.intervals.live_share
            seconds = self.measure.seconds * (3 * (trained + to_read) / tokens + looks)
            rows.append(("time", f"about {duration(seconds)}"))
        if rows:
            print(report.later_rows(rows), flush=True)


def _milestones(trainer: pl.Trainer, total: int) -> str:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    count = next(callback.milestones(total) for callback in callbacks if isinstance(callback, Checkpoints))
    return f" and {count:,} milestones" if count else ""


def _by_width(pl_module: SFTModule) -> str:
    if pl_module.optimization.learning_rate != "auto":
        return ""
    return f", for {pl_module.model.config.hidden_size:,} channels (model.learning_rate auto)"


def _live(share: float) -> str:
    return "" if share == 1 else f" ({share:.0%} of them between the first and the last, as a change since step 0)"


def _data_rows(data: SFTDataModule, pl_module: SFTModule) -> list[tuple[str, str]]:
    documents, epoch = data.plan.documents, data.plan.epoch(0)
    tokens, targets = int(epoch.lengths.sum()), int(epoch.targets.sum())
    rows = [
        ("chats", account.chosen(data.dealt)),
        ("", account.used(data.dealt)),
        *([("dropped", lost)] if (lost := account.dropped(documents.store)) else []),
        ("too long", account.too_long(documents)),
        *_silent_rows(data),
        ("tokens", f"{tokens:,} per epoch, {targets / tokens:.1%} supervised"),
        ("SFT : text", report.ratio(documents.store.meta["note"]["bytes"], data.pretrain_bytes, RULE_OF_THUMB)),
    ]
    told = {
        CHAT: ("validation", ""),
        PRETRAIN: ("held out" if data.text == UNSEEN else "text to keep", f", {data.text} by the base"),
        OWN_CHATS: ("chats to keep", ", self-written by the base, which is a chat model"),
    }
    for name, (what, known) in told.items():
        if name in data.evaluation:
            found = data.evaluation[name]
            also = found.store.meta["note"].get("in_pretrain", 0)
            rejected = f"rejected: {report.rejected(found.rejected)}{_also_seen(also)}"
            rows.append((what, f"{len(found):,} documents{known}; {rejected}"))
    if pl_module.from_scratch:
        return rows
    rows += _doubts(data, pl_module)
    if data.own_chats == "auto" and OWN_CHATS not in data.evaluation:
        rows.append(("chats to keep", "none: the base is no chat model (a number as data.own_chats measures anyway)"))
    return rows


def _also_seen(count: int) -> str:
    more = "1 more stands" if count == 1 else f"{count:,} more stand"
    return f"; {more} in data.pretrain_path, too: not measured on" if count else ""


def _silent_rows(data: SFTDataModule) -> list[tuple[str, str]]:
    store = data.plan.documents.store
    silent = silent_answers(store, TokenTexts(data.template.tokenizer))
    if not silent:
        return []
    chats = "1 chat" if len(silent) == 1 else f"{len(silent):,} chats"
    answers = "an answer that says" if silent.total() == 1 else f"{silent.total():,} answers that say"
    told = f"{chats} with {answers} nothing, learned as such; the first: {store.where(min(silent))}"
    return [("empty answers", told)]


def _doubts(data: SFTDataModule, pl_module: SFTModule) -> list[tuple[str, str]]:
    """What looks as if it was given by mistake."""
    rows = []
    train, validation = data.plan.documents.store, data.evaluation.get(CHAT)
    if told := report.text_for_chats(train.chats):
        rows.append(("", f"data.train_path: {told}; nothing teaches a model to chat"))
    elif validation is not None and (told := report.text_for_chats(validation.store.chats)):
        rows.append(("", f"data.val_path: {told}; the chats' loss is not that of chatting"))
    measured = "data.heldout_path" if data.text == UNSEEN else "data.pretrain_path"
    for key, text, what in (
        (measured, data.evaluation.get(PRETRAIN), "called forgotten"),
        ("data.pretrain_path", data.spare_text, "held on to"),
    ):
        if text is not None and (told := report.chats_for_text(text.store.chats, len(text.store))):
            rows.append(("", f"{key}: {told}: what is {what} is then how to chat"))
    tokens_known, rows_of_model = data.template.vocab_size, pl_module.model.config.vocab_size
    if tokens_known < 0.9 * rows_of_model:
        sizes = f"{tokens_known:,} tokens, where the model has {rows_of_model:,}"
        rows.append(("tokenizer", f"{sizes}: is data.tokenizer the base's own?"))
    return rows


def _holding(data: SFTDataModule, pl_module: SFTModule) -> str:
    """What keeps the model near its base."""
    said, replay, holding = [], data.plan.replay, pl_module.holding
    if replay is not None:
        text = "text by the base" if data.replays_own else "pretraining text"
        tokens = np.mean([replay.lengths[window].sum() for window in data.plan.epoch(0).replay])
        pieces = f" in pieces of {data.replay_length}" if data.replay_length else ""
        said.append(
            f"replay of {tokens:,.0f} tokens of {text} a step ({data.replay_ratio:g} of the chats'; "
            f"{len(replay.documents):,} documents{pieces}, none of them measured{_near(data)}), "
            f"{holding.replay_loss} loss of weight {holding.replay_weight:g}"
            + (f", {data.replay_in_chat:.0%} of it in a chat" if data.replay_in_chat else "")
            + (f", which follows a target of {holding.replay_target:g} nats" if holding.replay_target else "")
        )
    others = [term for term in holding.terms if term.name != "replay" and term is not holding.prior]
    said += [f"{term.name}, weight {term.weight:g}" for term in others]
    if holding.prior is not None:
        said.append(
            f"a pull towards the base as if by {holding.prior_tokens:,.0f} tokens of its text beside the "
            f"{data.plan.most_targets:,} supervised ones of the sample (weight {holding.prior.weight:.3g})"
        )
    if holding.fisher_tokens and not pl_module.from_scratch:
        assert data.spare_text is not None
        tokens = data.spare_text.lengths_of_first(holding.tokens_of_basis(pl_module.model)).sum()
        said.append(f"AdamW's moments in a basis read from {tokens:,} tokens of such text")
    said += [f"frozen: {', '.join(pl_module.frozen)}"] if pl_module.frozen else []
    return "; ".join(said) or "by nothing but the little data"


def _near(data: SFTDataModule) -> str:
    """What is not replayed because it is too like what is measured."""
    assert data.spare_text is not None
    near = len(data.spare_text.left_out.get(IN_MEASURED, ()))
    return f", without {near:,} that repeat measured text" if near else ""


def _text_line(text: float, chat: float | None, pl_module: SFTModule, data: SFTDataModule) -> str:
    line = f"{text:.4f} nats per token"
    if pl_module.from_scratch:
        return line
    if report.likely_not_pretrained(text, pl_module.model.config.vocab_size):
        return (
            f"{line}: no better than guessing. Either this base was not pretrained, or data.tokenizer is not its own, "
            "or its text was framed otherwise (data.document_format)"
        )
    if chat is not None and abs(chat - text) < 0.3:
        line += f"; the chats' is within {abs(chat - text):.2f}: text so like the chats can hardly show forgetting"
    return line
