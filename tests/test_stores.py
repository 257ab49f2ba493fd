"""From files and settings to what is trained on, validated on and measured on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def chat(question: str, answer: str = "Yes.", **more: Any) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"conversations": turns, **more}, ensure_ascii=False) + "\n"


def text(words: str) -> str:
    return json.dumps({"text": words}) + "\n"


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"tokenizer": str(PROJECT / "data" / "tokenizer"), "cache_dir": str(tmp_path / "cache")}


def test_opening_the_stores_needs_neither_torch_nor_lightning(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_path"] = write(tmp_path / "chats.jsonl", chat("a"))
    code = (
        "import sys; from minimind_sft.stores import Stores; "
        f"print(len(Stores(**{settings!r}).open(train=True).train), {{'torch', 'lightning'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout == "1 set()\n"
