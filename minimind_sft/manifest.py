"""A sample on disk: the file, and the manifest beside it that says what it was made from. No torch.

Both are written under temporary names and moved, so a file of that name is always whole. What lies at the place is
replaced only if it is a sample of ours that nobody changed, or on request: `sample data/*.jsonl` with OUT forgotten
would otherwise eat the last input.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minimind_sft.mixture import Part
from minimind_sft.selection import MEBIBYTE, Selection


def manifest_path(output: str | Path) -> Path:
    """Where the manifest of a sample lies: beside it, as ``NAME.manifest.json``."""
    return Path(f"{output}.manifest.json")


def write_sample(selection: Selection, output: Path, expected: dict[str, Any] | None = None) -> dict[str, Any]:
    """The sample and its manifest, moved into place once complete and, where a manifest is expected, verified."""
    output.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with _temporary(output) as part, _temporary(manifest_path(output)) as manifest_part:
        with part.open("xb") as file:
            for block in selection.blocks():
                data = b"\n".join([*block.raw, b""])
                digest.update(data)
                file.write(data)
            size = file.tell()
        manifest = selection.manifest()
        manifest["output"] = {"name": str(output), "size": size, "sha256": digest.hexdigest()}
        if expected is not None:
            _verify(manifest, expected)
        with manifest_part.open("x", encoding="utf-8") as text:
            json.dump(manifest, text, indent=2, ensure_ascii=False)
            text.write("\n")
        part.replace(output)
        manifest_part.replace(manifest_path(output))
    return manifest if selection.why_empty is None else {**manifest, "warning": selection.why_empty}


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write under; what is left there at the end is removed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _verify(made: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("lines_seen", "blank", "selected", "bytes", "stopped_by", "sources"):
        if name in expected and made[name] != expected[name]:
            raise ValueError(
                f"the rebuilt sample differs from its manifest: {name} is {made[name]}, not {expected[name]}"
            )
    if "output" in expected and made["output"]["sha256"] != expected["output"]["sha256"]:
        raise ValueError(
            f"the rebuilt sample differs from its manifest: SHA-256 {made['output']['sha256']}, not "
            f"{expected['output']['sha256']}. The inputs are the same, so seed, caps or the manifest itself were edited"
        )


def load_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the NAME.manifest.json beside a sample")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        good = {"inputs", "max_mb", "seed"} <= set(manifest) and bool(manifest["inputs"])
        good = good and all({"name", "size", "sha256"} <= set(entry) for entry in manifest["inputs"])
        parts = manifest.get("sources", []) if good else []
        good = good and all(set(Part._fields) <= set(entry) for entry in parts)
        good = good and (not parts or sum(entry["files"] for entry in parts) == len(manifest["inputs"]))
    except (ValueError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path} is not the manifest of a sample: give the NAME.manifest.json beside a sample")
    return dict(manifest)


def find_input(name: str, manifest: Path) -> Path:
    """An input by its name in the manifest, from the current folder or the manifest's; else by its bare name there."""
    places = [Path(name), manifest.parent / name, manifest.parent / Path(name).name]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"{name}, an input of {manifest}, does not exist (tried {', '.join(map(str, places))}): put it there"
    )


def check_output(output: Path, files: Sequence[Path], *, overwrite: bool) -> None:
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name the file to write, such as {output / 'sample.jsonl'}")
    if output.suffix in (".gz", ".zst", ".parquet"):
        raise ValueError(
            f"{output}: a sample is written as plain lines, so a name ending in {output.suffix} misleads: leave it off"
        )
    if not output.exists():
        return
    if any(output.samefile(file) for file in files):
        raise ValueError(
            f"{output} is one of the inputs and would be overwritten: name another file for the sample, last"
        )
    if output.stat().st_size and not overwrite and not _is_our_sample(output):
        raise ValueError(
            f"{output} exists, and it is not a sample with its manifest: add --overwrite to replace it, or name another"
        )


def _is_our_sample(output: Path) -> bool:
    """Whether the manifest beside ``output`` has its size and hash, so that it can be rebuilt once it is replaced."""
    try:
        recorded = load_manifest(manifest_path(output))["output"]
        if recorded["size"] != output.stat().st_size:
            return False
        digest = hashlib.sha256()
        with output.open("rb") as file:
            while data := file.read(MEBIBYTE):
                digest.update(data)
        return bool(digest.hexdigest() == recorded["sha256"])
    except (ValueError, KeyError, TypeError):
        return False
