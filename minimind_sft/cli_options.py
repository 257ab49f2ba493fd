"""The command line of `fit`, `validate` and `predict`: options besides model, data and trainer, errors in one line.

Lightning's Trainer has settings that would count in micro-batches, stop in the middle of a window or shuffle again
what the plan has dealt. They are not offered (`NOT_OFFERED` says what to use instead); every other one works as
documented.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NoReturn, Union

from lightning.pytorch.cli import LightningArgumentParser

from minimind_sft.messages import nearest_setting, plainly

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
    "min_steps": "trainer.max_steps: training ends early only where patience is set",
    "min_epochs": "trainer.max_epochs: training ends early only where patience is set",
    "sync_batchnorm": "nothing: there is no batch norm in the model",
    "benchmark": "nothing: there are no convolutions in the model",
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
    """Errors in one line, with the nearest key.

    Attributes:
        configs: the YAMLs of this command line, by their files, to say in which of them a key stands.
    """

    configs: dict[str, Any] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(self._explained(plainly(str(message))))

    def _explained(self, message: str) -> str:
        for name, instead in NOT_OFFERED.items():
            if re.search(rf"trainer\.{name}\b|[\"']trainer[\"'].*\b{name}\b|\b{name}\b.*[\"']trainer[\"']", message):
                return f"trainer.{name} is not offered here; use {instead}"
        if "arguments are required" in message and (keys := re.findall(r"\b(?:model|data)\.\w+", message)):
            return (
                f"{', '.join(keys)}: not set. sft.yaml sets them; an overlay comes behind it: "
                "--config sft.yaml --config original.yaml"
            )
        if word := re.fullmatch(r"unrecognized arguments: ([^-].*)", message):
            return f"{word[1]}: settings are given as --KEY VALUE, and files of settings as --config FILE"
        wrong = re.search(r"--([\w.]+)", message) if "nrecognized" in message else None
        wrong = wrong or re.search(
            r"[\"']([\w.]+)[\"'] is not expected|does not accept.*?[\"']([\w.]+)[\"']|nested key '([\w.]+)'", message
        )
        if wrong is None:
            return message
        key = next(group for group in wrong.groups() if group)
        known = [name for name in self._keys() if not name.startswith("trainer.callbacks.")]
        if files := [file for file, content in self.configs.items() if _has(content, key)]:
            message = f"{' and '.join(files)}: {key} is not a setting"
        return message + nearest_setting(key, known)

    def _keys(self) -> list[str]:
        verbs = self._subcommands_action
        parsers = [self] if verbs is None else [self, *verbs._name_parser_map.values()]
        return [
            action.dest
            for parser in parsers
            for action in parser._actions
            if action.dest not in ("help", "config") and "." in action.dest or action.option_strings
        ]


def _has(content: Any, key: str) -> bool:
    """Whether a YAML has this key, a.b for b within a."""
    for name in key.split("."):
        if not isinstance(content, dict) or name not in content:
            return False
        content = content[name]
    return True


# what `validate` and `predict` take only because a config of `fit` has it, and do not offer
OF_FIT = (
    "wandb",
    *("log_every_steps", "val_every_steps", "save_every_steps", "keep_every_steps"),
    *("patience", "on_nonfinite", "spike_ratio", "export", "overwrite", "plan", "plan_tflops"),
)


def add_run_options(parser: LightningArgumentParser) -> None:
    """Options of the run as a whole: where, on what, how often."""
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
        help="steps between two readings; null: as often, and of as many documents, as costs a twentieth of the time",
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
