"""Names on the Hugging Face hub, `hf:owner/name` or `hf:owner/name@revision`: a name in, a local folder out.

The prefix is needed, so that a mistyped path is never looked for on the network, and something local of that name wins.
`huggingface_hub` (the extra `hub`) keeps what was fetched: a second run asks only whether it has changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

PREFIX = "hf:"
DESCRIPTIONS = ("*.json", "*.jinja")
WEIGHTS = (("*.safetensors",), ("*.bin", "*.pth"))  # the second only where there is none of the first
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local(source: str | Path) -> Path:
    """A path; of a hub name, the folder that it was fetched to.

    Raises:
        ValueError: not a hub name, `huggingface_hub` is not installed, or nothing could be fetched.
    """
    path, text = Path(source), str(source)
    if not text.startswith(PREFIX) or path.exists():
        return path
    return _fetched(text)


@cache
def _fetched(text: str) -> Path:
    """The folder of a hub name; asked for once, so that all of a process has the same."""
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{text} is not a hub name; write hf:owner/name or hf:owner/name@revision")
    fetch = _fetcher(text)
    try:
        for weights in WEIGHTS:
            folder = Path(fetch(name, revision=revision or None, allow_patterns=[*DESCRIPTIONS, *weights]))
            if any(next(folder.glob(pattern), None) for pattern in weights):
                break
    except Exception as error:  # the library raises whatever its HTTP client does
        said = " ".join(str(error).split())
        raise ValueError(f"{text} could not be fetched: {type(error).__name__}: {said[:300]}") from error
    return folder


def _fetcher(name: str) -> Callable[..., str]:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name} is on the hub, which needs the package huggingface_hub: pip install huggingface_hub (the extra "
            "hub: pip install -e '.[hub]')"
        ) from error
    return snapshot_download
