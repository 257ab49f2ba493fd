"""The `sample` verb: files in, a seeded, size-capped sample and its manifest out. No torch.

The same bytes as the original's `sample_jsonl_by_size`: all lines, blank ones too, are shuffled with Python's
`random`; a walk over them skips blank ones and stops for good at the first that would pass the cap, which counts
stripped UTF-8 bytes without newlines in MB of 1024 * 1024. So with one seed a smaller cap's sample is the beginning
of a larger one's.

On 1.6 GB, 2.2 million lines and a cap of 72 MB: 2.5 processor seconds, of which hashing takes 1.0 on a second core,
and 75 MB, against 8.7 s and 3.1 GB for the original's way (`tests/benchmarks/bench_sampling.py`).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from minimind_sft.lines import Line, Progress, read_lines
from minimind_sft.manifest import check_output, find_input, load_manifest, manifest_path, write_sample
from minimind_sft.mixture import Part
from minimind_sft.options import nearest_option
from minimind_sft.selection import MEBIBYTE, Selection, select
from minimind_sft.sources import expand

__all__ = ["Line", "Selection", "expand", "main", "manifest_path", "read_lines", "rebuild", "sample", "select"]


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
        ValueError: for unusable inputs (see `select`), an output that is one of them, or that is not ours to replace.
    """
    files, output = expand(inputs), Path(output)
    check_output(output, files, overwrite=overwrite)
    return write_sample(select(files, max_mb=max_mb, seed=seed, max_rows=max_rows, progress=progress), output)


def rebuild(
    manifest: str | Path, output: str | Path | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Make the sample that a manifest describes again, and verify inputs and output by their SHA-256 before it appears.

    Args:
        manifest: a file that `sample` wrote, or a run's ``sample.json``, which names no output, so that inputs and
            figures are all there is to verify.
        output: where to write it; by default the name in the manifest, beside it.
        overwrite: replace whatever lies at ``output``.
        progress: called with (bytes read, bytes in all).

    Raises:
        ValueError: for a manifest that is none, an input that is missing or has changed, or a result that differs.
    """
    manifest = Path(manifest)
    wanted = load_manifest(manifest)
    if output is None:
        if "output" not in wanted:
            raise ValueError(
                f"{manifest} names no output: say where to write the sample, as in `sample --manifest {manifest} OUT`"
            )
        output = manifest.parent / Path(wanted["output"]["name"]).name
    output = Path(output)
    files = [find_input(entry["name"], manifest) for entry in wanted["inputs"]]
    check_output(output, files, overwrite=overwrite)
    selection = select(
        files,
        max_mb=wanted["max_mb"],
        seed=wanted["seed"],
        max_rows=wanted.get("max_rows"),
        parts=[Part(*(source[name] for name in Part._fields)) for source in wanted.get("sources", ())],
        progress=progress,
    )
    for found, entry in zip(selection.inputs, wanted["inputs"], strict=True):
        if found["sha256"] != entry["sha256"]:
            raise ValueError(
                f"{found['name']} is not the file that {manifest} was made from: {found['size']:,} bytes, SHA-256 "
                f"{found['sha256']}; the manifest has {entry['size']:,} bytes, SHA-256 {entry['sha256']}. Find that "
                f"version, or sample anew"
            )
    return write_sample(selection, output, expected=wanted)


# ---- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with the nearest option where one is unknown."""
        near = nearest_option(self, message)
        self.exit(2, f"{self.prog}: error: {message}{f' (did you mean {near}?)' if near else ''}; see --help\n")


def _cap(text: str) -> float | None:
    return None if text.lower() in ("null", "none") else float(text)


_cap.__name__ = "number of MB"  # what argparse calls it in an error


def _parser() -> _Parser:
    parser = _Parser(
        prog="minimind_sft sample",
        allow_abbrev=False,
        usage="%(prog)s IN... OUT [--max_mb 72] [--seed 42] [--max_rows N] [--overwrite]\n"
        "       %(prog)s --manifest FILE [OUT]",
        description="Write a seeded random sample of the lines of JSONL files, as large as a cap allows, and "
        "OUT.manifest.json, which says what it was made from. A .json file may be an array, whose elements are written "
        "as lines; both may be .gz or .zst. A .parquet file's rows are written as objects of their columns. The same "
        "seed always gives the same bytes, and a smaller cap's sample is the beginning of a larger one's.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="IN... OUT", help="files, globs or folders to sample from; last, the file to write"
    )
    parser.add_argument(
        "--max_mb",
        type=_cap,
        default=72.0,
        help="cap in MB of 1024 * 1024 bytes, newlines not counted; null for none (default: 72)",
    )
    parser.add_argument("--max_rows", type=int, help="cap in lines; the tighter cap wins (default: none)")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle (default: 42)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT even if it is not a sample of ours")
    parser.add_argument(
        "--manifest", metavar="FILE", help="make the sample that this manifest describes again and verify its hash"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """The ``sample`` verb; returns the exit status: 0, or 2 with one message on stderr."""
    parser = _parser()
    options, verified = parser.parse_intermixed_args(list(argv)), False
    try:
        with _progress_line() as progress:
            if options.manifest is not None:
                if len(options.paths) > 1:
                    raise ValueError(
                        f"--manifest FILE takes at most one path, OUT, and the inputs from FILE; got {options.paths}"
                    )
                verified = "output" in load_manifest(Path(options.manifest))
                made = rebuild(
                    options.manifest,
                    options.paths[0] if options.paths else None,
                    overwrite=options.overwrite,
                    progress=progress,
                )
            elif len(options.paths) < 2:
                raise ValueError(
                    f"at least one input and, last, the file to write are needed; got {options.paths or 'none'}"
                )
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
    print(_summary(made, verified=verified))
    return 0


def _summary(made: dict[str, Any], *, verified: bool) -> str:
    ends = {"max_mb": "the next line would pass max_mb", "max_rows": "max_rows is reached", "end": "nothing is left"}
    target = "none" if made["max_mb"] is None else f"{made['max_mb']:g} MB"
    rows = "" if made.get("max_rows") is None else f", {made['max_rows']:,} lines"
    output, size = made["output"], made["output"]["size"] / MEBIBYTE
    return (
        f"sampled      {made['selected']:,} of {made['lines_seen']:,} lines ({made['blank']:,} blank), "
        f"seed {made['seed']}\n"
        f"target size  {target}{rows}\n"
        f"actual size  {made['bytes'] / MEBIBYTE:.2f} MB ({made['bytes']:,} bytes, newlines not counted); "
        f"{ends[made['stopped_by']]}\n"
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
