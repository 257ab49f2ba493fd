"""The model card of an export: what the model is, what fine-tuning cost, and where it comes from, as far as known.

In come the weights' origin and, where they lie in a run directory, its records (`run.json`, `sample.json`,
`config.yaml`, `forgetting.json`); out comes the README.md of a Hugging Face folder. A card is published, so of paths
only the last part is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minimind_sft.checkpoint_files import read_record
from minimind_sft.files import resolve, sha256_file
from minimind_sft.hub import PREFIX
from minimind_sft.origins import Origin, find_origin
from minimind_sft.pretraining_text import SELF_WRITTEN
from minimind_sft.report import megabytes, rejected
from minimind_sft.weights import Loaded

SETTINGS = ("model", "data", "trainer")  # sections that decide what a model becomes
STAGES = 8  # followed back at most
MEASURED = (
    ("chat_loss", "chats, nats per token"), ("pretrain_loss", "text, nats per token"),
    ("bits_per_byte", "text, bits per byte"), ("own_chat_loss", "its base's own chats, nats per token"),
)  # fmt: skip

USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def model_card(title: str, loaded: Loaded, origin: Origin, *, made: str = "") -> str:
    """The card as Markdown.

    Args:
        title: its heading.
        loaded: the weights, or those that they were made from.
        origin: where they lie.
        made: how these weights were made from those, and what they were measured at; empty where they are the same.
    """
    record = read_record(loaded.path) if loaded.path.is_file() else {}
    exported = origin.run_dir is not None and origin.run_dir / "export" in loaded.path.absolute().parents
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- minimind\n- sft\n---",
        f"# {title}",
        f"A language model: {loaded.summary()}. {_made(record)} minimind_sft, supervised fine-tuning that measures "
        "what a model forgets.",
        f"## How it was made\n\n{made}" if made else _cost(origin.run_dir, record) if record or exported else "",
        "## Where it comes from",
        _table(["", ""], [("made from" if made else "weights", _weights(loaded, record)), *_lineage(origin, record)]),
        _settings(origin.run_dir, record),
        "## Use",
        USE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(record: Mapping[str, Any]) -> str:
    if not record:
        return "Exported by"
    return "Fine-tuned with" if record["base_sha256"] else "Trained from scratch with"


def _weights(loaded: Loaded, record: Mapping[str, Any]) -> str:
    step = f", after step {record['step']:,}" if record.get("step") is not None else ""
    return f"{loaded.path.name}{step}, {loaded.dtype}, SHA-256 `{loaded.sha256}`"


def _cost(run_dir: Path | None, record: Mapping[str, Any]) -> str:
    """What `fit` measured, before and after; `report.forgetting_table` would import torchmetrics, which takes 3 s."""
    figures = _json(run_dir, "forgetting.json")
    readings = {name: figures[name] for name in ("before", "after", "best") if isinstance(figures.get(name), dict)}
    if not readings:
        return ""
    rows = [_measured(what, key, readings) for key, what in MEASURED]
    if isinstance(figures.get("forgetting"), float):
        start = readings["before"]["pretrain_loss"]
        losses = {name: reading["pretrain_loss"] for name, reading in readings.items()}
        risen = {name: {} if loss is None else {"risen": loss - start} for name, loss in losses.items()}
        rows.append(_measured("forgotten, nats per token", "risen", risen, sign="+"))
    head = ["", *(f"{name} (step {reading.get('step')}{_of_part(reading)})" for name, reading in readings.items())]
    word = figures.get("text") or {"True": "seen", "False": "unseen"}.get(str(figures.get("seen")))
    known = {"seen": ", seen by the base", "unseen": ", unseen by the base"}.get(str(word), "")
    text = f"The text is pretraining text{known}."
    if word == SELF_WRITTEN:
        text = "The text was written by the base itself."
    if record.get("step") is not None:
        text += f" These weights are those of step {record['step']:,}."
    return f"## What training cost\n\n{_table(head, [row for row in rows if row])}\n\n{text}"


def _of_part(reading: Mapping[str, Any]) -> str:
    """Where not all documents were looked at, on how many of them."""
    share = reading.get("looked_at")
    return f", on {share:.0%} of the documents" if isinstance(share, float) and share < 1 else ""


def _measured(what: str, key: str, readings: Mapping[str, Mapping[str, Any]], *, sign: str = "") -> list[str]:
    """A row of the table; empty where it was not measured."""
    values = [reading.get(key) for reading in readings.values()]
    if not any(isinstance(value, float) for value in values):
        return []
    return [what, *(f"{value:{sign}.4f}" if isinstance(value, float) else "-" for value in values)]


def _lineage(origin: Origin, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Base, data and versions; then the same of the run that made the base, as far back as files and hashes agree."""
    rows: list[tuple[str, str]] = []
    if origin.run_dir is None:
        return [("base", _base(None, record["base_sha256"]))] if record else []
    at: Origin | None = origin
    for stage in range(STAGES):
        if at is None or at.run_dir is None:
            break
        before = f"earlier: {at.run_dir.resolve().name}, " if stage else ""
        facts, sample = _json(at.run_dir, "run.json"), _json(at.run_dir, "sample.json")
        weights, sha256 = at.setting("model", "weights"), facts.get("base_sha256")
        rows.append((f"{before}base", _base(weights, sha256)))
        rows += [(f"{before}data", text) for text in _data(sample)]
        if not stage and isinstance(facts.get("versions"), dict):
            rows.append(("made with", ", ".join(f"{name} {value}" for name, value in facts["versions"].items())))
        at = _before(at, weights, sha256)
    return rows


def _before(origin: Origin, weights: object, sha256: object) -> Origin | None:
    """The run that made a run's base, if it is still there and its weights are the same."""
    if not isinstance(weights, str) or not isinstance(sha256, str) or weights.startswith(PREFIX):
        return None
    base = find_origin(resolve(weights))
    if base.run_dir in (None, origin.run_dir) or not base.path.is_file() or sha256_file(base.path) != sha256:
        return None
    return base


def _base(weights: object, sha256: object) -> str:
    if not sha256:
        return "none: random weights"
    return f"{_last_part(weights)}, SHA-256 `{sha256}`" if weights else f"SHA-256 `{sha256}`"


def _data(sample: Mapping[str, Any]) -> list[str]:
    """Which lines were trained on, and the files that they are from."""
    try:
        cap = "no cap" if sample["max_mb"] is None else f"cap {sample['max_mb']:g} MB"
        chosen = f"{sample['selected']:,} of {sample['lines_seen'] - sample['blank']:,} lines"
        said = f"{chosen}, {megabytes(sample['bytes'])} ({cap}, seed {sample['seed']})"
        said += f"; rejected: {rejected(sample['rejected'])}"
        files = [(_last_part(row["name"]), f"{row['size']:,}", row["sha256"]) for row in sample["inputs"]]
    except (KeyError, TypeError, ValueError):
        return []
    return [said, *(f"{name}, {size} bytes, SHA-256 `{sha256}`" for name, size, sha256 in files)]


def _settings(run_dir: Path | None, record: Mapping[str, Any]) -> str:
    """What was set, without what was left open."""
    settings: Any = record.get("settings")
    if run_dir is not None:
        try:
            config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
            settings = {name: config[name] for name in SETTINGS}
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            pass
    if not isinstance(settings, Mapping):
        return ""
    text = yaml.safe_dump(_public(settings), sort_keys=False, allow_unicode=True).rstrip()
    return f"<details><summary>Settings</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _public(value: Any) -> Any:
    """Settings that are set, with paths cut to their last part."""
    if isinstance(value, Mapping):
        return {name: _texts(entry) if name == "system_prompts" else _public(entry)
                for name, entry in value.items() if entry is not None and name != "cache_dir"}  # fmt: skip
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return _last_part(value) if isinstance(value, str) else value


def _texts(prompts: Any) -> Any:
    """System prompts, which are texts where they are a list, and a path where they are not."""
    return prompts if isinstance(prompts, list) else _public(prompts)


def _last_part(text: object) -> str:
    return str(text) if str(text).startswith(PREFIX) else Path(str(text)).name


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "&#124;") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _json(run_dir: Path | None, name: str) -> dict[str, Any]:
    """A record of a run; empty where it is not there or not ours."""
    try:
        content = json.loads(((run_dir or Path("/nowhere")) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
