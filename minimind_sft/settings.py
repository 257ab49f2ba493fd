"""Settings for verbs that do not train: the same YAML and `--data.KEY VALUE` as `fit`, without importing Lightning.

What `fit` accepts under `data` is the typed signature of `data.SFTDataModule`, whose module imports Lightning (5 s). So
that signature is taken from the source instead, and made into a function that does nothing; jsonargparse then reads
YAML and command line by its types exactly as it does for `fit` (null, lists, 1e-3, the order of overlays). Of a YAML,
`data` and the keys named by the caller are looked at: its other sections are `fit`'s to judge. Reading the settings
takes 0.1 s.
"""

from __future__ import annotations

import ast
import json
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from minimind_sft.files import PROJECT
from minimind_sft.messages import nearest_setting, plainly

CONFIG = ("--config", "-c")


def find_config(argv: list[str]) -> list[str]:
    """Let `--config NAME` find `configs/NAME` of the project where the current folder has none, and say so."""
    words = list(argv)
    for place, before, name in named_configs(argv):
        shipped = PROJECT / "configs" / name
        if name and not Path(name).exists():
            if not shipped.is_file():
                names = ", ".join(sorted(path.name for path in (PROJECT / "configs").glob("*.yaml")))
                raise ValueError(f"--config {name}: no such file here, and configs/ holds {names}")
            print(f"using {shipped}", flush=True)
            words[place] = f"{before}{shipped}"
    return words


def named_configs(words: Sequence[str]) -> list[tuple[int, str, str]]:
    """The configs that a command line names: the place of the word, what stands before the name in it, and the name."""
    found = []
    for place, word in enumerate(words):
        option, sign, name = word.partition("=")
        if place and words[place - 1] in CONFIG:
            found.append((place, "", word))
        elif option in CONFIG and sign:
            found.append((place, f"{option}=", name))
    return found


def read_configs(words: list[str]) -> dict[str, Any]:
    """What the files behind `--config` hold, by their names, in order.

    Raises:
        ValueError: a file that is not there or no YAML.
    """
    return {name: _read_yaml(Path(name)) for _, _, name in named_configs(words)}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ValueError(f"--config {path}: {told}") from error
    if not isinstance(content, dict):
        what = "holds no settings" if content is None else f"holds {_shown(content)}"
        raise ValueError(f"--config {path} {what}; settings are `key: value` lines, such as `run_dir: runs/mine`")
    return content


def _shown(content: Any) -> str:
    return f"a list, beginning with {content[0]!r}" if isinstance(content, list) and content else repr(content)


def data_signature() -> Callable[..., None]:
    """A function that takes what `SFTDataModule` takes, by the same names, types and defaults, and does nothing."""
    tree = ast.parse(Path(__file__).with_name("data.py").read_text(encoding="utf-8"))
    (module,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SFTDataModule")
    (init,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    del init.args.args[0]  # self
    init.name, init.returns = "data", None
    init.body = [ast.Expr(ast.Constant(ast.get_docstring(module)))]
    space: dict[str, Any] = vars(typing).copy()
    exec(compile(ast.fix_missing_locations(ast.Module([init], [])), "data.py", "exec"), space)  # our own source
    return typing.cast(Callable[..., None], space["data"])


class SettingsParser(ArgumentParser):
    """A parser for `verb` that knows `--config`, `--data.KEY` and `--trainer.accumulate_grad_batches`.

    Errors are `ValueError`s in one line, with the nearest key.
    """

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"minimind_sft {verb}", description=description, allow_abbrev=False)
        self.add_argument("-c", "--config", action="config", help="a YAML as for fit; a later one overlays it")
        self.add_function_arguments(data_signature(), "data")
        self.add_argument(
            "--trainer.accumulate_grad_batches", type=int, default=1, help="micro-batches per optimizer step"
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = plainly(str(message))
        wrong = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if wrong is not None:
            known = [action.dest for action in self._actions if "." in action.dest or action.option_strings]
            key = wrong[1] or f"data.{wrong[2]}"
            message += nearest_setting(key, known)
        raise ValueError(message)

    def read(self, argv: Sequence[str]) -> Any:
        """The settings of a command line, as a namespace.

        Raises:
            ValueError: for an unknown or missing key, a value of the wrong type, a config that is not there or no YAML.
        """
        words = find_config(list(argv))
        for place, before, name in named_configs(words):
            words[place] = before + _of_ours(Path(name))
        return self.parse_args(words)


def _of_ours(path: Path) -> str:
    """What concerns us of a YAML, as the text that jsonargparse takes in place of a file's name."""
    content = _read_yaml(path)
    sections = [content.get(name) or {} for name in ("data", "trainer")]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError(f"--config {path}: settings must be `key: value` lines, with those of data under `data:`")
    data, trainer = sections
    ours = {"data": data}
    if "accumulate_grad_batches" in trainer:
        ours["trainer"] = {"accumulate_grad_batches": trainer["accumulate_grad_batches"]}
    try:
        return json.dumps(ours)
    except TypeError as error:  # a date, say
        raise ValueError(f"--config {path}: {error}; put the value in quotes") from error
