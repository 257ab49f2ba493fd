"""LightningCLI for `fit`, `validate` and `predict`: settings in, a Trainer out; no domain logic.

Lightning's Trainer has settings that would count in micro-batches, stop in the middle of a window or shuffle again
what the plan has dealt. They are not offered (`NOT_OFFERED` says what to use instead); every other one works as
documented.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, Union

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from minimind_sft.checkpoints import AtomicCheckpointIO, Checkpoints
from minimind_sft.data import SFTDataModule
from minimind_sft.devices import pin_device, resolve_precision
from minimind_sft.export import FORMATS
from minimind_sft.guard import Guard
from minimind_sft.measuring import Measure
from minimind_sft.module import SFTModule
from minimind_sft.records import MetricsFile
from minimind_sft.rundir import find_checkpoint, prepare_run_dir, refuse_own_weights, wandb_logger
from minimind_sft.screen import FirstScreen, LastScreen, Record
from minimind_sft.settings import find_config
from minimind_sft.step_log import StepLog

NOT_OFFERED = {
    "precision": "precision",
    "logger": "wandb",
    "default_root_dir": "run_dir",
    "fast_dev_run": "trainer.max_steps: 1",
    "limit_train_batches": "trainer.max_steps or data.max_mb",
    "limit_val_batches": "data.measure_documents",
    "limit_test_batches": "nothing: there is no test verb",
    "limit_predict_batches": "a shorter data.val_path",
    "overfit_batches": "data.max_mb",
    "max_time": "trainer.max_steps",
    "val_check_interval": "val_every_steps",
    "check_val_every_n_epoch": "val_every_steps",
    "num_sanity_val_steps": "nothing: step 0 is always measured",
    "log_every_n_steps": "log_every_steps",
    "enable_checkpointing": "save_every_steps",
    "enable_progress_bar": "nothing: a bar on a terminal, plain lines elsewhere",
    "enable_model_summary": "nothing: the first screen tells",
    "use_distributed_sampler": "nothing: the plan deals documents to ranks",
    "reload_dataloaders_every_n_epochs": "nothing: every epoch is planned anew",
    "barebones": "nothing",
    "model_registry": "nothing",
    "enable_autolog_hparams": "nothing: settings are in config.yaml",
    "inference_mode": "nothing: looking at a model never needs gradients",
}
OptionalFloat = Union[float, None]  # noqa: UP007
OptionalInt = Union[int, None]  # noqa: UP007 (jsonargparse wants an object)
Precision = Literal["auto", "32", "bf16-mixed", "16-mixed"]


class Parser(LightningArgumentParser):
    """Errors in one line, with the nearest key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(self._explained(" ".join(str(message).split())))

    def _explained(self, message: str) -> str:
        for name, instead in NOT_OFFERED.items():
            if re.search(rf"trainer\.{name}\b|[\"']trainer[\"'].*\b{name}\b|\b{name}\b.*[\"']trainer[\"']", message):
                return f"trainer.{name} is not offered here; use {instead}"
        wrong = re.search(r"--([\w.]+)", message) if "nrecognized" in message else None
        wrong = wrong or re.search(
            r"[\"']([\w.]+)[\"'] is not expected|does not accept.*?[\"']([\w.]+)[\"']|nested key '([\w.]+)'", message
        )
        if wrong is None:
            return message
        key = next(group for group in wrong.groups() if group)
        known = [name for name in self._keys() if not name.startswith("trainer.callbacks.")]
        near = difflib.get_close_matches(key, known, 1, 0.5) or difflib.get_close_matches(
            key.split(".")[-1], [name.split(".")[-1] for name in known], 1, 0.6
        )
        return message + (f". The nearest setting is {near[0]}" if near else "")

    def _keys(self) -> list[str]:
        return [
            action.dest
            for action in self._actions
            if action.dest not in ("help", "config") and "." in action.dest or action.option_strings
        ]


class SFTCLI(LightningCLI):
    """Our top-level settings, and a Trainer built from them."""

    command: list[str]
    lock: IO[str] | None = None  # on the run directory, while it is trained in

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
            "predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The command line as given to us, whatever `sys.argv` holds (Lightning would warn)."""
        self.config = parser.parse_args(args)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything: `data.seed`."""

    def _set_seed(self) -> None:
        from lightning.pytorch import seed_everything

        seed_everything(self._get(self.config, "data")["seed"], workers=True, verbose=False)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(
            Trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True, skip=set(NOT_OFFERED)
        )
        parser.set_defaults(
            {"trainer.max_epochs": 3, "trainer.gradient_clip_val": 1.0, "trainer.accumulate_grad_batches": 1}
        )
        parser.add_lightning_class_args(SFTModule, "model")
        parser.add_lightning_class_args(SFTDataModule, "data")
        parser.link_arguments("data.seed", "model.seed")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/sft", help="folder that records the run")
        parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:7 or cuda:0,1")
        parser.add_argument(
            "--precision",
            type=Precision,
            default="auto",
            help="auto: bf16-mixed where the GPU has it, else 16-mixed; 32 on a CPU",
        )
        parser.add_argument(
            "--wandb",
            type=Literal["online", "offline", None],
            default=None,
            nargs="?",
            const="online",
            help="log to Weights & Biases",
        )
        parser.add_argument(
            "--log_every_steps", type=int, default=10, help="optimizer steps between two lines of the log"
        )
        parser.add_argument(
            "--val_every_steps",
            type=OptionalInt,
            default=None,
            help="steps between two readings; null: as often, and of as many documents, as costs 5 %% of the time",
        )
        parser.add_argument(
            "--save_every_steps",
            type=OptionalInt,
            default=None,
            help="steps between two checkpoints; null: the smaller of 100 and a quarter of an epoch",
        )
        parser.add_argument(
            "--keep_every_steps",
            type=OptionalInt,
            default=None,
            help="steps between two checkpoints that are kept for good; null: only last and best",
        )
        parser.add_argument(
            "--patience",
            type=OptionalInt,
            default=None,
            help="readings in a row without a new best after which training ends; null: train to the end",
        )
        parser.add_argument(
            "--on_nonfinite",
            type=Literal["stop", "skip"],
            default="stop",
            help="when a loss or gradient is not finite: stop the run, or skip the step (10 in a row stop it)",
        )
        parser.add_argument(
            "--spike_ratio",
            type=OptionalFloat,
            default=2.0,
            help="note the documents of a step whose loss is above this multiple of its running mean; null: never",
        )
        parser.add_argument(
            "--export",
            type=Literal["all", "minimind", "hf", "none"],
            default="all",
            help="formats that best.ckpt and last.ckpt are exported to at the end, in run_dir/export",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, nargs="?", const=True, help="replace a run that is in run_dir"
        )
        parser.add_argument(
            "--plan",
            type=bool,
            default=False,
            nargs="?",
            const=True,
            help="fit: build nothing; print what the run would take in memory, steps, time and disk",
        )
        parser.add_argument(
            "--plan_tflops",
            type=OptionalFloat,
            default=None,
            help="throughput that --plan counts on, in 10^12 floating-point operations per second",
        )

    def _parse_ckpt_path(self) -> None:
        """Settings come from the YAML and the command line, never from a checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and look at the run directory before anything is loaded."""
        settings = self.config[self.subcommand]
        if self._planning:
            return
        self.run_dir = Path(settings["run_dir"])
        settings["ckpt_path"] = find_checkpoint(settings["ckpt_path"], self.run_dir, str(self.subcommand))
        if self.subcommand == "fit" and settings["ckpt_path"] is None:
            refuse_own_weights(self.run_dir, settings["model"]["weights"])
        if self.subcommand == "fit" and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            SFTCLI.lock = prepare_run_dir(
                self.run_dir, resuming=settings["ckpt_path"] is not None, overwrite=settings["overwrite"]
            )

    @property
    def _planning(self) -> bool:
        if self.config[self.subcommand]["plan"] and self.subcommand != "fit":
            raise ValueError(f"--plan belongs to fit, which takes memory and time; {self.subcommand} has no plan")
        return bool(self.config[self.subcommand]["plan"])

    def instantiate_classes(self) -> None:
        if not self._planning:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if not self._planning:
            super()._run_subcommand(subcommand)
            return
        from minimind_sft.forecast import forecast

        settings = self.config[subcommand]
        print(
            forecast(
                **{name: settings[name] for name in ("model", "data", "trainer", "device", "precision")},
                keep_every=settings["keep_every_steps"],
                tflops=settings["plan_tflops"],
            ),
            flush=True,
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings, given = self.config[self.subcommand], dict(self._get(self.config_init, "trainer"))
        theirs: list[Callback] = given.pop("callbacks") or []
        theirs = theirs if isinstance(theirs, list) else [theirs]
        for callback in theirs:
            if isinstance(callback, GradientAccumulationScheduler):
                raise ValueError(
                    "GradientAccumulationScheduler changes windows in mid-run; use trainer.accumulate_grad_batches"
                )
        plugins = given.pop("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        given |= pin_device(settings["device"], given["accelerator"], given["devices"])
        accelerator = given["accelerator"]
        return Trainer(
            **given,
            precision=resolve_precision(settings["precision"], accelerator),  # type: ignore[arg-type]
            callbacks=[*theirs, *self._callbacks(settings)],
            logger=self._loggers(settings),
            plugins=[AtomicCheckpointIO(), *plugins],
            default_root_dir=self.run_dir,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            limit_val_batches=0 if self.subcommand == "fit" else None,  # fit measures through a callback
        )

    def _callbacks(self, settings: Any) -> list[Callback]:
        if self.subcommand == "predict":
            return [WritePredictions(self.run_dir / "predictions.jsonl")]
        if self.subcommand == "validate":
            return []
        rank_zero = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self.model.guard = Guard(
            folder=self.run_dir if rank_zero else None,
            on_nonfinite=settings["on_nonfinite"],
            spike_ratio=settings["spike_ratio"],
        )
        measure = Measure(
            log_every=settings["log_every_steps"],
            val_every=settings["val_every_steps"],
            save_every=settings["save_every_steps"],
            max_forgetting=self.model.max_forgetting,
            patience=settings["patience"],
        )
        return [
            Record(self.run_dir, self._yaml, self.command),
            StepLog(measure),  # before measure: the step's row first, then its reading
            measure,
            FirstScreen(measure),
            LastScreen(
                self.run_dir,
                measure,
                self.datamodule.probes,
                self.datamodule.document_format,
                {"all": FORMATS, "none": ()}.get(settings["export"], (settings["export"],)),
            ),
            Checkpoints(self.run_dir / "checkpoints", measure, keep_every=settings["keep_every_steps"]),
        ]

    def _yaml(self) -> str:
        """The settings as given, without what belongs to one start only."""
        settings = self.config[self.subcommand].clone()
        settings["ckpt_path"], settings["overwrite"] = None, False
        del settings["plan"], settings["plan_tflops"]
        return str(self._parser(self.subcommand).dump(settings, skip_none=False, skip_validation=True))

    def _loggers(self, settings: Any) -> list[Logger]:
        if self.subcommand != "fit":
            return []
        loggers: list[Logger] = [MetricsFile(self.run_dir)]
        if settings["wandb"]:
            loggers.append(
                wandb_logger(
                    self.run_dir, offline=settings["wandb"] == "offline", resuming=settings["ckpt_path"] is not None
                )
            )
        return loggers


class WritePredictions(Callback):
    """Answers as JSON lines: `where`, `messages`, `reference`, `answer`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 (closed at the end)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for row in outputs:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file.close()
        print(f"answers in {self.path}", flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's tips off the screen; warnings of our own and real ones stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*not resumable.*",
            ".*is not resumable.*",
            ".*LeafSpec.*",
            ".*TreeSpec.*",
            ".*litlogger.*",
            ".*Checkpoint directory.*",
            ".*`isinstance.treespec.*",
            ".*in eval mode.*",
            ".*overridden `transfer_batch_to_device`.*",
            ".*callbacks used to create the checkpoint.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def run(verb: str, argv: list[str]) -> int:
    """Run a training verb; see `__main__.main`."""
    SFTCLI.command = [verb, *argv]
    no_abbreviations = {"allow_abbrev": False}
    try:
        with quiet():
            SFTCLI(
                SFTModule,
                SFTDataModule,
                save_config_callback=None,
                parser_class=Parser,
                parser_kwargs=no_abbreviations | dict.fromkeys(SFTCLI.subcommands(), no_abbreviations),
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=find_config([verb, *argv]),
            )
    finally:
        if SFTCLI.lock is not None:
            SFTCLI.lock.close()
            SFTCLI.lock = None
    return 0
