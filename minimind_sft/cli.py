"""LightningCLI for `fit`, `validate` and `predict`: settings in, a Trainer out; no domain logic."""

from __future__ import annotations

import contextlib
import logging
import warnings
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment

from minimind_sft.checkpoints import AtomicCheckpointIO, Checkpoints
from minimind_sft.cli_options import NOT_OFFERED, OF_FIT, Parser, add_run_options
from minimind_sft.data import SFTDataModule
from minimind_sft.devices import pin_device, resolve_precision
from minimind_sft.export import FORMATS
from minimind_sft.files import in_full
from minimind_sft.first_screen import FirstScreen, Record
from minimind_sft.guard import Guard
from minimind_sft.last_screen import LastScreen
from minimind_sft.measuring import Measure
from minimind_sft.messages import plainly
from minimind_sft.module import SFTModule
from minimind_sft.predictions import PrintReading, WritePredictions
from minimind_sft.ranges import check_ranges
from minimind_sft.records import MetricsFile
from minimind_sft.rundir import (
    find_checkpoint,
    is_rank_zero,
    leave_run_dir,
    prepare_run_dir,
    refuse_own_weights,
    wandb_logger,
)
from minimind_sft.settings import find_config, read_configs
from minimind_sft.signals import EndTogether
from minimind_sft.step_log import StepLog


class SFTCLI(LightningCLI):
    """Our top-level settings, and a Trainer built from them."""

    command: list[str]
    descriptions = {
        "fit": "Fine-tune a base on chats, hold on to what it knew, and measure what it forgets. Defaults are those "
        "without a config; sft.yaml sets its own.",
        "validate": "Measure a model on the validation chats and the pretraining text.",
        "predict": "Answer the validation chats, as JSON lines.",
    }
    lock: IO[str] | None = None  # on the run directory, while it is trained in

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
            "predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"},
        }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        (option,) = (action for action in parser._actions if action.dest == "ckpt_path")
        what = "go on from" if subcommand == "fit" else "load"
        option.help = f"checkpoint to {what}: last or best of run_dir, a file, or auto for last where there is one"
        if subcommand != "fit":
            for action in parser._actions:
                if action.dest in OF_FIT:
                    action.help = SUPPRESS
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The command line as given to us, whatever `sys.argv` holds (Lightning would warn)."""
        self.config = parser.parse_args(args)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything: `data.seed`."""

    def _set_seed(self) -> None:
        from lightning.pytorch import seed_everything

        seed = self._get(self.config, "data")["seed"]
        check_ranges("data", seed=seed)
        seed_everything(seed, workers=True, verbose=False)

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
        add_run_options(parser)

    def _parse_ckpt_path(self) -> None:
        """Settings come from the YAML and the command line, never from a checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and look at the run directory before anything is loaded."""
        settings = self.config[self.subcommand]
        trainer = settings["trainer"]
        check_ranges(
            "trainer", **{name: trainer[name] for name in ("gradient_clip_val", "accumulate_grad_batches")}
        )
        if trainer["gradient_clip_algorithm"] not in (None, "norm", "value"):
            raise ValueError(
                f"trainer.gradient_clip_algorithm is {trainer['gradient_clip_algorithm']!r}; choose norm or value"
            )
        if self._planning:
            return
        self.run_dir = Path(settings["run_dir"]).expanduser()
        settings["ckpt_path"] = find_checkpoint(settings["ckpt_path"], self.run_dir, str(self.subcommand))
        if self.subcommand == "fit" and settings["ckpt_path"] is None:
            refuse_own_weights(self.run_dir, settings["model"]["weights"])
        if self.subcommand == "fit" and is_rank_zero():
            SFTCLI.lock = prepare_run_dir(
                self.run_dir, checkpoint=settings["ckpt_path"], overwrite=settings["overwrite"]
            )

    @property
    def _planning(self) -> bool:
        if self.config[self.subcommand]["plan"] and self.subcommand != "fit":
            raise ValueError(f"--plan belongs to fit, which takes memory and time; {self.subcommand} has no plan")
        return bool(self.config[self.subcommand]["plan"])

    def instantiate_classes(self) -> None:
        if self._planning:
            return
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse makes the classes of `model.terms`, and wraps what they raise
            raise ValueError(plainly(str(error))) from error

    def _run_subcommand(self, subcommand: str) -> None:
        if not self._planning:
            super()._run_subcommand(subcommand)
            return
        from minimind_sft.forecast import forecast

        settings = self.config[subcommand]
        print(
            forecast(
                **{name: settings[name] for name in ("model", "data", "trainer", "device", "precision")},
                val_every=settings["val_every_steps"],
                keep_every=settings["keep_every_steps"],
                tflops=settings["plan_tflops"],
            ),
            flush=True,
        )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        more = {"verbose": False} if subcommand == "validate" else {}  # PrintReading does
        return super()._prepare_subcommand_kwargs(subcommand) | more

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
        if self.subcommand == "fit" and given["max_epochs"] is None and given["max_steps"] == -1:  # 1,000 to Lightning
            raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
        given |= pin_device(settings["device"], given["accelerator"], given["devices"])
        precision = resolve_precision(settings["precision"], given["accelerator"], given["devices"])
        return Trainer(
            **given,
            precision=precision,  # type: ignore[arg-type]
            callbacks=[*theirs, *self._callbacks(settings)],
            logger=self._loggers(settings),
            plugins=[AtomicCheckpointIO(), *_slurm(plugins), *plugins],
            default_root_dir=self.run_dir,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            limit_val_batches=0 if self.subcommand == "fit" else None,  # fit measures through a callback
        )

    def _callbacks(self, settings: Any) -> list[Callback]:
        read = settings["ckpt_path"], settings["model"]["weights"]
        if self.subcommand == "predict":
            return [WritePredictions(self.run_dir / "predictions.jsonl", *read)]
        if self.subcommand == "validate":
            return [PrintReading(*read)]
        self.model.guard = Guard(
            folder=self.run_dir if is_rank_zero() else None,
            speaks=is_rank_zero(),
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
            EndTogether(),
        ]

    def _yaml(self) -> str:
        """The settings as given, without what belongs to one start only."""
        settings = self.config[self.subcommand].clone()
        settings["ckpt_path"], settings["overwrite"] = None, False
        del settings["plan"], settings["plan_tflops"]
        settings["model"]["weights"] = in_full(settings["model"]["weights"])
        for key, value in settings["data"].items():
            if key.endswith("_path") or key == "tokenizer":
                settings["data"][key] = in_full(value)
        return str(self._parser(self.subcommand).dump(settings, skip_none=False, skip_validation=True))

    def _loggers(self, settings: Any) -> list[Logger]:
        if self.subcommand != "fit":
            return []
        loggers: list[Logger] = [MetricsFile(self.run_dir, self.model.holding.own_losses)]
        if settings["wandb"] and is_rank_zero():  # it notes its id in the run's folder
            loggers.append(
                wandb_logger(
                    self.run_dir, offline=settings["wandb"] == "offline", checkpoint=settings["ckpt_path"]
                )
            )
        return loggers


def _slurm(plugins: Sequence[Any]) -> list[SLURMEnvironment]:
    """Under SLURM its environment, without Lightning's way of putting a job back into the queue beside ours."""
    given = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() and not given else []


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
    words = find_config([verb, *argv])
    Parser.configs = read_configs(words)
    no_abbreviations = {"allow_abbrev": False}
    verbs = {name: no_abbreviations | {"description": told} for name, told in SFTCLI.descriptions.items()}
    try:
        with quiet():
            SFTCLI(
                SFTModule,
                SFTDataModule,
                save_config_callback=None,
                parser_class=Parser,
                parser_kwargs=no_abbreviations | {"prog": "minimind_sft"} | verbs,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=words,
            )
    except SystemExit as ending:
        if isinstance(ending.__context__, KeyboardInterrupt):  # Lightning's end of it is a 1 without a word
            raise KeyboardInterrupt from None
        raise
    finally:
        if SFTCLI.lock is not None:
            leave_run_dir(SFTCLI.lock)
            SFTCLI.lock = None
    return 0
