"""The `sample` verb: files in, a seeded, size-capped sample and its manifest out. No torch.

The same bytes as the original's `sample_jsonl_by_size`: all lines, blank ones too, are shuffled with Python's `random`; a walk
over them skips blank ones and stops for good at the first that would pass the cap, which counts stripped UTF-8 bytes without
newlines in MB of 1024 * 1024. So with one seed a smaller cap's sample is the beginning of a larger one's.

The sample is written under a temporary name and moved, so a file of that name is always whole; the manifest beside it says what it
was made from, so that it can be made again and checked. What lies at OUT is replaced only if it is a sample of ours that nobody
changed, or on request: `sample data/*.jsonl` without OUT would otherwise eat the last of them.

On 1.6 GB, 2 million lines, cap 72 MB, two cores: XXX s and XX MB, against XXX s and XXX GB for the original's way.
"""

import argparse
import difflib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from minimind_sft.lines import Line, Progress, read_lines
from minimind_sft.selection import MEBIBYTE, Selection, select
from minimind_sft.sources import expand

__all__ = ["Line", "Selection", "expand", "main", "manifest_path", "read_lines", "rebuild", "sample", "select"]


def manifest_path(output: str | Path) -> Path:
    """Where the manifest of a sample lies: beside it, as ``NAME.manifest.json``."""
    return Path(f"{output}.manifest.json")


def sample(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    max_mb: float | None,
    seed: int,
    max_rows: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a sample of ``inputs`` to ``output``, one stripped line a line, and its manifest beside it.

    Args:
        inputs: a file, glob, folder or list of them; they count as one file in the order given.
        output: the sample; its folder is made where it does not exist.
        max_mb: cap in MB (1024 * 1024 bytes) of lines without newlines; None for everything, shuffled.
        seed: of the permutation.
        max_rows: cap in lines.
        overwrite: replace whatever lies at ``output``.
        progress: called with (bytes read, bytes in all).

    Returns:
        The manifest. Where nothing could be selected the sample is empty, as the original's, and ``warning`` says why.

    Raises:
        ValueError: for unusable inputs (see `select`), an output that is one of them, or one that is not ours to replace.
    """
    files, output = expand(inputs), Path(output)
    _check_output(output, files, overwrite=overwrite)
    return _write(select(files, max_mb=max_mb, seed=seed, max_rows=max_rows, progress=progress), output)


def rebuild(
    manifest: str | Path, output: str | Path | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Make the sample that a manifest describes again, and verify inputs and output by their SHA-256 before it appears.

    Args:
        manifest: a file that `sample` wrote, or a run's ``sample.json`` (which names no output, so only inputs and figures are verified).
        output: where to write it; by default the name in the manifest, beside it.
        overwrite: replace whatever lies at ``output``.
        progress: called with (bytes read, bytes in all).

    Raises:
        ValueError: for a manifest that is none, an input that is missing or has changed, or a result that differs.
    """
    manifest = Path(manifest)
    wanted = _load_manifest(manifest)
    if output is None:
        if "output" not in wanted:
            raise ValueError(f"{manifest} names no output: say where to write the sample, as in `sample --manifest {manifest} OUT`")
        output = manifest.parent / Path(wanted["output"]["name"]).name
    output = Path(output)
    files = [_find_input(entry["name"], manifest) for entry in wanted["inputs"]]
    _check_output(output, files, overwrite=overwrite)
    selection = select(
        files, max_mb=wanted["max_mb"], seed=wanted["seed"], max_rows=wanted.get("max_rows"), progress=progress
    )
    for found, entry in zip(selection.inputs, wanted["inputs"], strict=True):
        if found["sha256"] != entry["sha256"]:
            raise ValueError(
                f"{found['name']} is not the file that {manifest} was made from: SHA-256 {found['sha256']}, {found['size']:,} "
                f"bytes, where the manifest has {entry['sha256']}, {entry['size']:,} bytes. Find that version, or sample anew"
            )
    return _write(selection, output, expected=wanted)


def _write(selection: Selection, output: Path, expected: dict[str, Any] | None = None) -> dict[str, Any]:
    """The sample and its manifest, both moved into place when they are complete and, where a manifest is expected, verified."""
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
    for name in ("lines_seen", "blank", "selected", "bytes", "stopped_by"):
        if name in expected and made[name] != expected[name]:
            raise ValueError(f"the rebuilt sample differs from its manifest: {name} is {made[name]}, not {expected[name]}")
    if "output" in expected and made["output"]["sha256"] != expected["output"]["sha256"]:
        raise ValueError(
            f"the rebuilt sample differs from its manifest: SHA-256 {made['output']['sha256']}, not {expected['output']['sha256']}. "
            f"The inputs are the same, so seed, caps or the manifest itself were edited"
        )


def _load_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the NAME.manifest.json beside a sample")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        good = {"inputs", "max_mb", "seed"} <= set(manifest) and bool(manifest["inputs"])
        good = good and all({"name", "size", "sha256"} <= set(entry) for entry in manifest["inputs"])
    except (ValueError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path} is not the manifest of a sample: give the NAME.manifest.json beside a sample")
    return dict(manifest)


def _find_input(name: str, manifest: Path) -> Path:
    """An input by its name in the manifest, from the current folder or from the manifest's; else by its bare name there."""
    places = [Path(name), manifest.parent / name, manifest.parent / Path(name).name]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"{name}, an input of {manifest}, does not exist (tried {', '.join(map(str, places))}): put it there")


def _check_output(output: Path, files: Sequence[Path], *, overwrite: bool) -> None:
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name the file to write, such as {output / 'sample.jsonl'}")
    if output.suffix in (".gz", ".zst"):
        raise ValueError(f"{output}: samples are written uncompressed, so a name ending in {output.suffix} would mislead: leave it off")
    if not output.exists():
        return
    if any(output.samefile(file) for file in files):
        raise ValueError(f"{output} is one of the inputs and would be overwritten: name another file for the sample, last")
    if output.stat().st_size and not overwrite and not _is_our_sample(output):
        raise ValueError(f"{output} exists, and it is not a sample with its manifest: add --overwrite to replace it, or name another")


def _is_our_sample(output: Path) -> bool:
    """Whether the manifest beside ``output`` has its size and hash, so that replacing it loses nothing that cannot be rebuilt."""
    try:
        recorded = _load_manifest(manifest_path(output))["output"]
        if recorded["size"] != output.stat().st_size:
            return False
        digest = hashlib.sha256()
        with output.open("rb") as file:
            while data := file.read(MEBIBYTE):
                digest.update(data)
        return bool(digest.hexdigest() == recorded["sha256"])
    except (ValueError, KeyError, TypeError):
        return False


# ---- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with the nearest option where one is unknown."""
        wrong = [word.split("=")[0] for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        near = [name for word in wrong for name in difflib.get_close_matches(word, self._option_string_actions, n=1)]
        self.exit(2, f"{self.prog}: error: {message}{f' (did you mean {near[0]}?)' if near else ''}; see --help\n")


def _cap(text: str) -> float | None:
    return None if text.lower() in ("null", "none") else float(text)


_cap.__name__ = "number of MB"  # what argparse calls it in an error


def _parser() -> _Parser:
    parser = _Parser(
        prog="minimind_sft sample",
        allow_abbrev=False,
        usage="%(prog)s IN... OUT [--max_mb 72] [--seed 42] [--max_rows N] [--overwrite]\n"
        "       %(prog)s --manifest FILE [OUT]",
        description="Write a seeded random sample of the lines of JSONL files (plain, .gz or .zst), as large as a cap allows, and "
        "OUT.manifest.json, which says what it was made from. The same seed always gives the same bytes, and a smaller cap's "
        "sample is the beginning of a larger one's.",
    )
    parser.add_argument("paths", nargs="*", metavar="IN... OUT", help="files, globs or folders to sample from; last, the file to write")
    parser.add_argument("--max_mb", type=_cap, default=72.0, help="cap in MB of 1024 * 1024 bytes, newlines not counted; null for none (default: 72)")
    parser.add_argument("--max_rows", type=int, help="cap in lines; the tighter cap wins (default: none)")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle (default: 42)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT even if it is not a sample of ours")
    parser.add_argument("--manifest", metavar="FILE", help="make the sample that this manifest describes again and verify its hash")
    return parser


def main(argv: Sequence[str]) -> int:
    """The ``sample`` verb; returns the exit status: 0, or 2 with one message on stderr."""
    parser = _parser()
    options = parser.parse_intermixed_args(list(argv))
    try:
        with _progress_line() as progress:
            if options.manifest is not None:
                if len(options.paths) > 1:
                    raise ValueError(f"--manifest FILE takes at most one path, OUT, and the inputs from FILE; got {options.paths}")
                made = rebuild(
                    options.manifest, options.paths[0] if options.paths else None, overwrite=options.overwrite, progress=progress
                )
            elif len(options.paths) < 2:
                raise ValueError(f"at least one input and, last, the file to write are needed; got {options.paths or 'none'}")
            else:
                *inputs, output = options.paths
                made = sample(
                    inputs,
                    output,
                    max_mb=options.max_mb,
                    seed=options.seed,
                    max_rows=options.max_rows,
                    overwrite=options.overwrite,
                    progress=progress,
                )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing was written", file=sys.stderr)
        return 130
    if "warning" in made:
        print(f"{parser.prog}: warning: {made['warning']}", file=sys.stderr)
    print(_summary(made, verified=options.manifest is not None and "output" in made))
    return 0


def _summary(made: dict[str, Any], *, verified: bool) -> str:
    ends = {"max_mb": "the next line would pass max_mb", "max_rows": "max_rows is reached", "end": "nothing is left"}
    target = "none" if made["max_mb"] is None else f"{made['max_mb']:g} MB"
    rows = "" if made.get("max_rows") is None else f", {made['max_rows']:,} lines"
    output, size = made["output"], made["output"]["size"] / MEBIBYTE
    return (
        f"sampled      {made['selected']:,} of {made['lines_seen']:,} lines ({made['blank']:,} blank), seed {made['seed']}\n"
        f"target size  {target}{rows}\n"
        f"actual size  {made['bytes'] / MEBIBYTE:.2f} MB ({made['bytes']:,} bytes, newlines not counted); {ends[made['stopped_by']]}\n"
        f"written      {output['name']} ({size:.2f} MB with newlines) and {manifest_path(output['name']).name}\n"
        f"sha256       {output['sha256']}{' as in the manifest' if verified else ''}"
    )


@contextmanager
def _progress_line() -> Iterator[Progress | None]:
    """On a terminal, a line that says how much is read; it is wiped at the end."""
    if not sys.stderr.isatty():
        yield None
        return
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if (percent := 100 * done // max(total, 1)) != shown:
            shown = percent
            print(f"\rreading {total / MEBIBYTE:,.0f} MB: {percent:3d} %", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if shown >= 0:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
