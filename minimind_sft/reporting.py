"""`python -m minimind_sft report RUN_DIR...`: what runs learned and forgot, as a page, pictures and a short table.

In come run directories, finished or not; out come `report.html`, which holds everything and opens from disk, and the
same pictures as PNGs for light and dark screens. Runs are only read, so one that is still training can be looked at.
Neither torch nor Lightning is imported: two runs take 2.5 s, nearly all of it drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minimind_sft.files import write_whole
from minimind_sft.options import OptionParser, language
from minimind_sft.report import printable, table
from minimind_sft.reporting_page import is_report, page
from minimind_sft.reporting_plots import draw, picture_names
from minimind_sft.reporting_table import cell_rows, notes
from minimind_sft.reporting_words import WORDS
from minimind_sft.run_files import read_runs


def parser() -> OptionParser:
    """The command line of `report`."""
    parser = OptionParser(
        "report",
        "Show what runs learned and forgot: a page that needs nothing else (report.html), pictures and a short table. "
        "Runs may be finished, stopped or still training.",
        weights=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="the folder of a run, such as runs/sft")
    add(
        "--out",
        metavar="DIR",
        help="where the page and the pictures go (RUN_DIR/report of one run, ./report of several)",
    )
    add("--lang", choices=sorted(WORDS), help="of the words on the page and the screen; by default as $LANG says")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: for a mistake in the command; a folder that is no run; a file of a run that cannot be read; files in
            the way that are no report's.
    """
    options = parser().parse_args(list(argv))
    lang = language(options.lang)
    words = WORDS[lang]
    runs = read_runs(options.runs)
    one = len(runs) == 1
    default = runs[0].folder / "report" if one else Path("report")
    out = default if options.out is None else Path(options.out).expanduser()
    there = [name for name in ("report.html", *picture_names()) if (out / name).exists()]
    if there and not (one and options.out is None) and not is_report(out / "report.html"):
        raise ValueError(f"{out} has {', '.join(there)}, but is no report's folder; choose another with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = draw(runs, out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); choose another folder with --out") from error
    write_whole(out / "report.html", page(runs, pictures, words, lang))
    head, *rows = cell_rows(runs, words)
    said = ["\n".join([table(head, rows), *notes(runs, words)])]
    names = ["report.html", *(path.name for picture in pictures for path in (picture.light, picture.dark))]
    said += ["", words["written"].format(folder=out, names=", ".join(names))]
    said.append(words["open"].format(page=out / "report.html"))
    print(printable("\n".join(said)), flush=True)
    return 0
