"""`python -m minimind_sft inspect`: the training data as the model will see it, before anything is trained.

In come the settings of `fit`; out come the first rows of the sample token by token (what is learned, what is context,
what is a control token, what `max_length` cuts), and figures of the whole set, on the screen and as a page. The store
is the one that `fit` opens: whichever comes first, the other starts from the cache. Neither torch nor Lightning is
imported: the demo's 4,224 chats take 0.8 s the first time and 0.5 s from the cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TextIO, Union

from minimind_sft import inspection_html
from minimind_sft.files import write_whole
from minimind_sft.findings import inspect_store
from minimind_sft.inspection_rows import View, rejected_rows
from minimind_sft.inspection_screen import ASCII, screen, visible
from minimind_sft.report import no_more_output
from minimind_sft.settings import SettingsParser
from minimind_sft.stores import Stores
from minimind_sft.token_texts import TokenTexts

OptionalStr = Union[str, None]  # noqa: UP007 (jsonargparse wants an object)


def parser() -> SettingsParser:
    """The command line of `inspect`."""
    parser = SettingsParser("inspect", "Show the training data as fit will see it; nothing is trained.")
    parser.add_argument("--rows", type=int, default=5, help="rows to show token by token, the first of the sample")
    parser.add_argument(
        "--where",
        type=OptionalStr,
        default=None,
        metavar="REASON",
        help="list the rows that ended so instead: a reason of rejection, cut or validation",
    )
    parser.add_argument("--html", type=OptionalStr, default=None, metavar="FILE", help="write a page as well")
    parser.add_argument(
        "--color", type=Literal["auto", "always", "never"], default="auto", help="auto: colours on a terminal only"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: for settings that `fit` would not accept, or a reason that no row has.
    """
    settings = parser().read(argv)
    if settings.rows < 0:
        raise ValueError(f"--rows is {settings.rows}; it counts rows, from 0")
    view = _view(settings.data, settings.trainer.accumulate_grad_batches)
    color = wants_color(settings.color, sys.stdout)
    try:
        if settings.where is not None:
            listed = rejected_rows(view, settings.where)
            if settings.html:
                listed = iter(rows := list(listed))
                _write(settings.html, inspection_html.list_page(settings.where, rows))
            for where, detail in listed:
                _say(f"{visible(where)}: {visible(detail)}")
        else:
            found = inspect_store(view, rows=settings.rows, max_bad_ratio=settings.data.max_bad_ratio)
            _say(screen(found, color=color))
            if settings.html:
                _write(settings.html, inspection_html.page(found, title=str(settings.data.train_path)))
        if settings.html:
            _say(f"\npage in {settings.html}")
        sys.stdout.flush()
    except BrokenPipeError:
        no_more_output()
    return 0


def wants_color(choice: str, stream: TextIO) -> bool:
    """Whether to colour: `always`, `never`, or `auto`: on a terminal that does not ask for none (`NO_COLOR`)."""
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _view(data: Any, accumulate: int) -> View:
    """The store and the settings of `fit`; that too many lines are bad is told, and is no reason not to look."""
    settings = {name: getattr(data, name) for name in signature(Stores).parameters}
    stores = Stores(**settings | {"max_bad_ratio": 1.0, "max_overlap": 1.0})
    return View(
        stores.documents(stores.open(train=True)),
        TokenTexts(stores.template.tokenizer),
        batch_size=data.batch_size,
        accumulate=accumulate,
        seed=data.seed,
        shuffle=data.shuffle,
        empty_think_ratio=data.empty_think_ratio,
        system_ratio=data.system_ratio,
        max_tokens_per_batch=data.max_tokens_per_batch,
    )


def _say(text: str) -> None:
    """Print, also where the output cannot hold every character."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)
    print(text)


def _write(name: str, text: str) -> None:
    write_whole(Path(name), text, called=f"--html {name}")
