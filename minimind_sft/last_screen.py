"""The last screen of `fit`: what came of the run, against the base, and the files that say so."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from minimind_sft import report
from minimind_sft.baselines import BaseAnswers
from minimind_sft.checkpoints import LAST
from minimind_sft.evaluation import sources_of
from minimind_sft.export import export_run
from minimind_sft.files import write_whole
from minimind_sft.forgetting import PRETRAIN, summary
from minimind_sft.generate import generate
from minimind_sft.measuring import Measure, evaluating
from minimind_sft.probes import Probe, Reply, answer_text, ask, compare, load_probes
from minimind_sft.strict_json import finite

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule
    from minimind_sft.module import SFTModule

SAMPLE_ANSWERS, SAMPLE_TOKENS = 3, 64
EMPTY = "(an empty answer)"


class LastScreen(Callback):
    """Before and after: facts, sample answers, the table, `forgetting.json` and others, and the picture.

    Args:
        folder: the run directory.
        measure: the readings.
        probes: files of fact probes, or none.
        document_format: framing of raw text.
        exports: formats that the best and the last checkpoint are exported to.
    """

    def __init__(
        self,
        folder: Path,
        measure: Measure,
        probes: Sequence[Path],
        document_format: str,
        exports: Sequence[str] = (),
    ) -> None:
        self.folder, self.measure, self.document_format, self.exports = folder, measure, document_format, exports
        self.probes: list[Probe] = load_probes(probes) if probes else []
        self.replies: list[Reply] = []
        self.answers: list[str] = []
        self._found: list[dict[str, Any]] | None = None  # the chats to answer

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0 and not pl_module.from_scratch and trainer.is_global_zero:
            self.replies, self.answers = self._ask_base(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say how a run ended that was killed behind its last step."""
        whole = (self.folder / "forgetting.json").is_file() or not (self.folder / "checkpoints" / LAST).is_file()
        if pl_module.nothing_left and not whole:  # Lightning then skips training and its hooks
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or not self.measure.readings:
            return
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        readings = self.measure.readings
        before, after, best = readings[0], readings[-1], self.measure.best
        from_base = not pl_module.from_scratch
        text = data.evaluation.get(PRETRAIN)
        documents = sources_of(text).counts if text else None
        share = self.measure.intervals.live_share if best is not None and best.step != after.step else 1.0
        figures = summary(
            before, after, best, text=data.text, from_base=from_base, documents=documents, looked_at=share
        )
        write_whole(self.folder / "forgetting.json", json.dumps(finite(figures), indent=1) + "\n")
        table = report.forgetting_table(before, after, best, text=data.text, from_base=from_base)
        print("\n" + table, flush=True)
        if best is not None and from_base and (note := report.never_better(before.chat_loss, best.chat_loss)):
            print(note, flush=True)
        if share < 1 and best is not None:
            print(f"step {best.step} was looked at on {share:.0%} of the documents (val_every_steps: all of them)")
        if before.chat_loss is not None and before.pretrain_loss is not None:
            report.plot(readings, self.folder / "forgetting.png")
        if not pl_module.from_scratch:
            self._compare(trainer, pl_module)
        if told := export_run(self.folder, self.exports):
            print("\n" + "\n".join(told), flush=True)
        print(
            f"\nin {self.folder}: "
            f"{', '.join(sorted(p.name for p in self.folder.iterdir() if not p.name.startswith('.')))}\n"
            f"as a page: python -m minimind_sft report {shlex.quote(str(self.folder))}",
            flush=True,
        )

    def _compare(self, trainer: pl.Trainer, pl_module: SFTModule) -> None:
        replies, answers = self._ask(trainer, pl_module)
        if self.probes and not self.replies:
            print("\nno comparison of facts: when the run began, data.probes_path was another file or none", flush=True)
        elif self.probes:
            comparison = compare(self.probes, self.replies, replies)
            write_whole(self.folder / "probes.json", json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
            print("\n" + report.probe_table(comparison), flush=True)
        told = [
            {"where": row["where"], "question": row["messages"][-1]["content"], "before": old, "after": new}
            for row, old, new in zip(self._samples(trainer), self.answers, answers, strict=True)
        ]
        if told:
            write_whole(self.folder / "answers.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        for row in told:
            print(
                f"\nuser    {row['question'][:200]}\nbefore  {row['before'][:200] or EMPTY}\n"
                f"after   {row['after'][:200] or EMPTY}",
                flush=True,
            )

    def _ask_base(self, trainer: pl.Trainer, pl_module: SFTModule) -> tuple[list[Reply], list[str]]:
        asked = {
            "probes": [asdict(probe) for probe in self.probes],
            "format": self.document_format,
            "prompts": [row["prompt_ids"] for row in self._samples(trainer)],
        }
        kept = BaseAnswers(trainer.datamodule, pl_module, asked)  # type: ignore[attr-defined]
        if (found := kept.find()) is not None:
            return found
        with pl_module.as_base():
            replies, answers = self._ask(trainer, pl_module)
        kept.keep(replies, answers)
        return replies, answers

    def _ask(self, trainer: pl.Trainer, pl_module: SFTModule) -> tuple[list[Reply], list[str]]:
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        with evaluating(trainer, pl_module):
            replies = (
                ask(pl_module.model, data.template, self.probes, document_format=self.document_format)
                if self.probes
                else []
            )
            prompts = [row["prompt_ids"] for row in self._samples(trainer)]
            ids = (
                generate(pl_module.model, prompts, max_new_tokens=SAMPLE_TOKENS, stop_ids=data.template.stop_ids)
                if prompts
                else []
            )
        return replies, [" ".join(answer_text(data.template, answer).split()) for answer in ids]

    def _samples(self, trainer: pl.Trainer) -> list[dict[str, Any]]:
        if self._found is None:
            data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
            self._found = data.sample_prompts(SAMPLE_ANSWERS)
        return self._found

    def state_dict(self) -> dict[str, Any]:
        asked = [asdict(probe) for probe in self.probes]
        return {"probes": asked, "replies": [asdict(reply) for reply in self.replies], "answers": self.answers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        asked = state_dict.get("probes")  # older checkpoints do not tell
        same = asked is None or [Probe(**probe) for probe in asked] == self.probes
        self.replies = [Reply(**reply) for reply in state_dict["replies"]] if same else []
        self.answers = state_dict["answers"]
