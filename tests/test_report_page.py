"""The verb `report`: run directories in, a page and pictures out, whatever state the runs are in."""

import base64
import fcntl
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from minimind_sft import reporting_plots
from minimind_sft.__main__ import main
from minimind_sft.reporting_style import DARK, LIGHT, label
from minimind_sft.reporting_words import SEEN, WORDS
from minimind_sft.run_files import read_runs
from minimind_sft.run_record import FINISHED, RUNNING, STOPPED

PROJECT = Path(__file__).resolve().parents[1]
METRICS = """\
step,epoch,train/loss,lr,grad_norm,train/replay,val/chat/loss,val/pretrain/loss,val/forgetting,seconds,\
val/pretrain/bits_per_byte
0,0.0,,,,,5.0,2.0,0.0,,1.2
10,1.0,4.0,0.0005,1.0,0.1,3.5,2.25,0.25,1000.0,
20,2.0,3.0,0.0001,1.0,0.2,3.0,2.125,0.125,1030.0,1.3
"""
READINGS = {
    "before": {"step": 0, "chat_loss": 5.0, "pretrain_loss": 2.0, "bits_per_byte": 1.0},
    "after": {"step": 20, "chat_loss": 3.0, "pretrain_loss": 2.125, "bits_per_byte": 1.1},
}
SUMMARY = {
    **READINGS,
    "best": READINGS["after"],
    "forgetting": 0.125,
    "seen": False,
    "by_source": [
        {"source": "poems", "documents": 48, "before": 2.5, "after": 2.875, "forgetting": 0.375},
        {"source": "sums", "documents": 12, "before": 1.5, "after": 1.4375, "forgetting": -0.0625},
    ],
}
PROBES = {
    "groups": {"raw/not_in_sft": {"probes": 9, "before": 7, "after": 6, "kept": 5, "lost": 2, "gained": 1}},
    "lost": [
        {"name": "capital of Peru", "way": "raw", "in_sft": False, "answer": "Lima", "said": "Quito"},
        {"name": "river of Egypt", "way": "raw", "in_sft": False, "answer": "Nile", "said": "Po"},
    ],
    "gained": [{"name": "capital of Chad", "way": "raw", "in_sft": False, "answer": "N'Djamena", "said": "N'Djamena"}],
    "replies": [{"name": "capital of Mali", "before": {"raw_right": True}, "after": {"raw_right": True}}],
}
ANSWERS = [{"where": "val.jsonl:1", "question": "What is 2 and 5?", "before": "Once upon a time", "after": "It is 7."}]
FILES = {
    "config.yaml": "run_dir: runs/x\nmodel:\n  learning_rate: 0.0005\ndata:\n  replay_ratio: 0.2\n  seed: 42\n",
    "run.json": {"command": ["fit", "--name", "a b"], "versions": {"torch": "2.9"}, "base_sha256": "c0ffee" * 8},
    "sample.json": {"inputs": [{"name": "chats.jsonl", "size": 4567}], "selected": 1234, "rejected": {"empty": 3}},
    "metrics.csv": METRICS,
    "forgetting.json": SUMMARY,
    "probes.json": PROBES,
    "answers.json": ANSWERS,
}
AT_THE_END = {"forgetting.json": None, "probes.json": None, "answers.json": None}


@pytest.fixture(autouse=True)
def _draw_only_where_pictures_are_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "everything" not in request.node.name:  # nearly all of the time of a report
        monkeypatch.setattr(reporting_plots, "_save", lambda _, path, places: [path.write_bytes(path.name.encode())])


def make_run(folder: Path, **changed: Any) -> Path:
    """A finished run; of `changed`, None leaves a file out. Names as in `forgetting_json`."""
    folder.mkdir(parents=True)
    for name, content in (FILES | {key.replace("_", "."): value for key, value in changed.items()}).items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def killed(folder: Path, **changed: Any) -> Path:
    return make_run(folder, forgetting_json=None, probes_json=None, answers_json=None, **changed)


class Reader(HTMLParser):
    """Texts, links and tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "source", "img", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)


def report(out: Path, *runs: Path, more: tuple[str, ...] = ("--lang=en",)) -> tuple[str, Reader]:
    """The texts of the page, and what it is made of."""
    assert main(["report", *map(str, runs), f"--out={out}", *more]) == 0
    reader = Reader()
    reader.feed((out / "report.html").read_text(encoding="utf-8"))
    assert not reader.open
    return " ".join(reader.said), reader


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["report", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minimind_sft: error: ") and said.count("\n") == 1, said
    return said


# ---- what is shown


def test_a_finished_run_shows_everything_it_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "held")
    assert main(["report", str(run), "--lang=en"]) == 0
    told = capsys.readouterr().out
    assert "held  finished          20 (2)    5.0000 → 3.0000   2.0000 → 2.1250    +0.1250" in told
    assert "2 / 7    3.00" in told and str(run / "report" / "report.html") in told
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    for fact in (
        "unseen by the base",
        *("148.41 → 20.09", "7.39 → 8.37", "1.2000 → 1.3000"),  # perplexities; bits per byte
        *("poems", "+0.3750", "-0.0625", "48"),
        *("capital of Peru", "Quito", "capital of Chad", "capital of Mali"),
        *("What is 2 and 5?", "Once upon a time", "It is 7."),
        *("data.replay_ratio", "1,234", "chats.jsonl", "rejected.empty", "c0ffee" * 8, "versions.torch", "2.9"),
        "python -m minimind_sft fit --name &#x27;a b&#x27;",
    ):
        assert fact in page, fact
    for name in ("trajectories", "steps", "losses", "sources", "facts"):
        light, dark = (imread(run / "report" / f"{name}{theme.suffix}.png") for theme in (LIGHT, DARK))
        assert light.shape == dark.shape and light.shape[1] > 600
        assert light[0, 0, :3].min() > 0.9 and dark[0, 0, :3].max() < 0.2  # their grounds
        assert light[..., :3].std() > 0.02 and dark[..., :3].std() > 0.02  # there is something on them


def test_two_runs_stand_side_by_side_and_what_differs_comes_first(tmp_path: Path) -> None:
    other = FILES["config.yaml"].replace("0.2", "0.0").replace("runs/x", "runs/y")  # type: ignore[attr-defined]
    answers = [ANSWERS[0] | {"after": "It is 8."}]
    first = make_run(tmp_path / "held")
    second = make_run(tmp_path / "plain", config_yaml=other, answers_json=answers)
    said, _ = report(tmp_path / "out", first, second)
    differing = said[said.index("In which the runs differ") : said.index("All 4 settings")]
    assert "data.replay_ratio" in differing and "data.seed" not in differing and "run_dir" not in differing
    assert said.count("Once upon a time") == 1  # one base, one answer before
    assert "after: held" in said and "It is 7." in said and "after: plain" in said and "It is 8." in said
    assert "different bases" not in said and "with care" not in said
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'content: " \\2260"' in page and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_runs_that_do_not_compare_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    other = make_run(tmp_path / "b", run_json={"base_sha256": "0"})
    assert "different bases" in report(tmp_path / "out", run, other)[0]
    other = make_run(tmp_path / "c", metrics_csv=METRICS.replace("5.0,2.0,0.0", "5.0,2.1,0.0"))
    assert "measured their base differently" in report(tmp_path / "out", run, other)[0]


def test_whatever_people_and_models_said_is_only_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\u202e"
    probes = json.loads(json.dumps(PROBES).replace("Quito", "<script>").replace("capital of Mali", "<img src=x>"))
    answers = [{"question": evil, "before": evil, "after": evil}]
    by_source = [{"source": evil, "documents": 1, "before": 1.0, "after": 2.0, "forgetting": 1.0}]
    run = make_run(
        tmp_path / "<script>&$run",
        answers_json=answers,
        probes_json=probes,
        forgetting_json=SUMMARY | {"by_source": by_source, "seen": evil},
        sample_json={evil: evil},
        run_json={"command": [evil], evil: evil},
        config_yaml=f"data:\n  train_path: '{evil}'\n",
    )
    _, reader = report(tmp_path / "out", run)
    assert "script" not in reader.tags
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "\u202e" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in text
    assert "<img src=x>" not in text


def test_a_best_that_was_looked_at_in_part_says_so_and_losses_may_be_no_numbers(tmp_path: Path) -> None:
    best = SUMMARY["best"] | {"looked_at": 0.1}
    by_source = [{"source": "books", "documents": 1, "before": 1.0, "after": None, "forgetting": None}]
    run = make_run(tmp_path / "run", forgetting_json=SUMMARY | {"best": best, "by_source": by_source})
    said, _ = report(tmp_path / "out", run)
    assert "(10%)" in said and "of the documents that the best reading was looked at on" in said
    said, _ = report(tmp_path / "whole", make_run(tmp_path / "other"))
    assert "(10%)" not in said and "in brackets" not in said


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    _, reader = report(tmp_path / "out", make_run(tmp_path / "run"))
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    inlined = [base64.b64decode(link.split(",")[1]).decode() for link in reader.links]
    names = ("trajectories", "steps", "losses", "sources", "facts")
    assert inlined == [file for name in names for file in (f"{name}_dark.png", f"{name}.png")]
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    assert text.count('media="(prefers-color-scheme: dark)"') == 5


def test_the_words_are_those_of_the_language_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [*(PROJECT / "minimind_sft").glob("reporting*.py"), PROJECT / "minimind_sft" / "run_record.py"]
    code = "".join(file.read_text(encoding="utf-8") for file in files if file.name != "reporting_words.py")
    assert WORDS["en"].keys() == WORDS["zh"].keys() and SEEN["en"].keys() == SEEN["zh"].keys()
    for key, text in WORDS["en"].items():
        assert re.search(f"[\"']{key}[\"']", code), f"{key} is never said"
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", WORDS["zh"][key])), key
    run = make_run(tmp_path / "run")
    said, _ = report(tmp_path / "out", run, more=("--lang=zh",))
    assert "忘掉" in said and "facts" not in said and "已完成" in capsys.readouterr().out
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert "忘掉" in report(tmp_path / "out", run, more=())[0]


def test_names_that_the_fonts_cannot_write_are_numbered_in_pictures() -> None:
    assert label("held", "run 1") == "held" and label("$x$", "run 1") == r"\$x\$" and label("_x", "run 1") == " _x"
    assert label("a" * 40, "run 1", longest=5) == "…aaaa"
    assert label("\u202eheld", "run 1") == "run 1" and label("\U000f0000", "run 2") == "run 2"


# ---- runs that are not finished, or of another version


def test_a_killed_run_shows_its_path_and_why_the_rest_is_missing(tmp_path: Path) -> None:
    half_written = METRICS + "30,3.0,2.5,0.00005,1.0,0.1,2."
    run = killed(tmp_path / "run", metrics_csv=half_written)
    said, reader = report(tmp_path / "out", run)
    assert "stopped before its end" in said and "20 (2)" in said and "20  3.0000  +0.1250" in said
    assert len(reader.links) == 6  # trajectories, steps, losses
    for why in ("fit records it when it ends", "fit asks the facts", "fit writes answers.json at its end"):
        assert why in said, why


def test_a_run_is_still_training_while_its_lock_is_held(tmp_path: Path) -> None:
    run = killed(tmp_path / "run")
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_runs([str(run)])[0].state == RUNNING
    assert read_runs([str(run)])[0].state == STOPPED
    assert read_runs([str(make_run(tmp_path / "done"))])[0].state == FINISHED


def test_a_run_that_went_on_after_its_end_says_of_which_step_its_facts_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics_csv=METRICS + "30,3.0,2.5,0.00005,1.0,0.1,2.5,2.5,0.5,1060.0\n")
    said, _ = report(tmp_path / "out", run)
    assert "stopped before its end" in said and "run went on after its end at step 20" in said
    assert "30  2.5000  +0.5000" in said  # the best so far, not that of the summary


def test_the_best_so_far_is_within_the_bound_of_the_run(tmp_path: Path) -> None:
    rows = METRICS + "30,3.0,2.5,0.00005,1.0,0.1,2.5,2.5,0.5,1060.0\n"
    bound = "model:\n  max_forgetting: 0.2\n"
    (run,) = read_runs([str(killed(tmp_path / "run", metrics_csv=rows, config_yaml=bound))])
    assert run.best is not None and run.best.step == 20
    (run,) = read_runs([str(killed(tmp_path / "free", metrics_csv=rows))])
    assert run.best is not None and run.best.step == 30
    bound = "model:\n  max_forgetting: 0.01\n"  # none is within: the one that forgot least
    (run,) = read_runs([str(killed(tmp_path / "tight", metrics_csv=rows, config_yaml=bound))])
    assert run.best is not None and run.best.step == 20


def test_a_run_of_an_older_version_is_shown_without_what_it_lacks(tmp_path: Path) -> None:
    lines = [line.split(",") for line in METRICS.splitlines()]
    without_replay = "".join(",".join(cells[:5] + cells[6:]) + "\n" for cells in lines)
    old = make_run(
        tmp_path / "old",
        metrics_csv=without_replay,
        forgetting_json={**READINGS, "best": None, "forgetting": 0.125},
        run_json={"command": ["fit"]},
        config_yaml="data:\n  seed: 42\n",
        sample_json=None,
        probes_json=None,
        answers_json=None,
    )
    said, reader = report(tmp_path / "out", old)
    assert "finished" in said and "+0.1250" in said and "sample.json is not there" in said
    assert "No run replayed text" in said and len(reader.links) == 6
    said, _ = report(tmp_path / "out", old, make_run(tmp_path / "new"))
    assert "old: not recorded" in said and "old: none recorded" in said and "poems" in said
    assert "The runs have the same settings" in said  # as far as both know them


@pytest.mark.parametrize("metrics", [None, "", METRICS.splitlines(keepends=True)[0]])
def test_a_run_without_a_step_is_no_mistake(tmp_path: Path, metrics: str | None) -> None:
    said, reader = report(tmp_path / "out", killed(tmp_path / "run", metrics_csv=metrics))
    assert "No step has been logged yet" in said and "No run has measured anything yet" in said
    assert not reader.links and not list((tmp_path / "out").glob("*.png"))


def test_without_text_only_chats_are_shown(tmp_path: Path) -> None:
    rows = "step,epoch,train/loss,lr,val/chat/loss,seconds\n0,0.0,,,5.0,\n10,1.0,4.0,0.0005,3.5,1000.0\n"
    summary = {
        "before": {"step": 0, "chat_loss": 5.0, "pretrain_loss": None, "bits_per_byte": None},
        "after": {"step": 10, "chat_loss": 3.5, "pretrain_loss": None, "bits_per_byte": None},
        "best": None,
        "forgetting": None,
        "seen": None,
    }
    said, reader = report(tmp_path / "out", make_run(tmp_path / "run", metrics_csv=rows, forgetting_json=summary))
    assert "No run measured both chats and forgetting" in said and "5.0000 → 3.5000" in said
    assert (tmp_path / "out" / "steps.png").is_file() and not (tmp_path / "out" / "trajectories.png").exists()


def test_losses_that_are_no_numbers_are_shown_as_such(tmp_path: Path) -> None:
    rows = METRICS.replace("20,2.0,3.0,0.0001,1.0,0.2,3.0,2.125,0.125", "20,2.0,nan,0.0001,1.0,inf,nan,inf,inf")
    said, _ = report(tmp_path / "out", killed(tmp_path / "run", metrics_csv=rows))
    assert "5.0000 → nan" in said and "+inf" in said and "10  3.5000" in said


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    report(tmp_path / "out", make_run(tmp_path / "whole"))
    assert (tmp_path / "out" / "facts_dark.png").exists()
    report(tmp_path / "out", killed(tmp_path / "killed"))
    assert not list((tmp_path / "out").glob("facts*"))


# ---- mistakes


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs" / "sft")
    assert "does not exist" in refused(capsys, tmp_path / "none")
    assert "is a file" in refused(capsys, run / "run.json")
    said = refused(capsys, tmp_path / "runs")
    assert "is no run" in said and str(run) in said  # what to name instead
    (run / "run.json").unlink()
    assert "lacks config.yaml or run.json" in refused(capsys, run)
    assert "RUN_DIR" in refused(capsys)
    assert "--lang" in refused(capsys, run, "--lnag=zh")


def test_a_run_is_named_once_and_runs_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make_run(tmp_path / "a" / "sft"), make_run(tmp_path / "b" / "sft")
    assert "is the same run as" in refused(capsys, first, tmp_path / "a" / ".." / "a" / "sft")
    third = make_run(tmp_path / "other")
    assert [run.name for run in read_runs([*map(str, (first, second, third))])] == ["a/sft", "b/sft", "other"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("forgetting.json", "{", "forgetting.json: cannot be read"),
        ("forgetting.json", "[]", "forgetting.json: not what fit writes"),
        ("forgetting.json", '{"after": 3}', "forgetting.json: not what fit writes"),
        ("forgetting.json", json.dumps(SUMMARY | {"seen": []}), "forgetting.json: not what fit writes"),
        ("forgetting.json", json.dumps(SUMMARY | {"by_source": [1]}), "forgetting.json: not what fit writes"),
        ("probes.json", '{"groups": {}}', "probes.json: not what fit writes (KeyError: 'lost')"),
        ("answers.json", '[{"question": "a"}]', "answers.json: not what fit writes"),
        ("sample.json", "\udcff", "sample.json: cannot be read"),
        ("metrics.csv", "step,lr\n1,fast\n", "metrics.csv:2: not a row of metrics"),
        ("metrics.csv", "step,lr\nnan,0.1\n", "metrics.csv: there is a row without a step"),
        ("metrics.csv", "lr\n0.1\n", "metrics.csv: there is a row without a step"),
        ("config.yaml", "a: [", "config.yaml: cannot be read"),
        ("config.yaml", "", "config.yaml: no settings"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    message = refused(capsys, run)
    assert said in message and re.search("restore it|remove", message)


def test_where_a_report_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a"]) == 0 and (first / "report" / "report.html").is_file()
    assert main(["report", "a", "b"]) == 0 and (tmp_path / "report" / "report.html").is_file()
    assert main(["report", "a", "b"]) == 0  # over its own
    (tmp_path / "file").touch()
    assert "--out" in refused(capsys, first, second, "--out=file")
    (tmp_path / "mine").mkdir()
    for name in ("facts.png", "report.html"):
        (tmp_path / "mine" / name).write_text("<html>mine")
        assert f"mine has {name}, but is no report's folder" in refused(capsys, first, second, "--out=mine")
        assert (tmp_path / "mine" / name).read_text() == "<html>mine"
        (tmp_path / "mine" / name).unlink()


def test_a_report_needs_neither_torch_nor_lightning(tmp_path: Path) -> None:
    argv = ["report", str(make_run(tmp_path / "a")), str(make_run(tmp_path / "b")), f"--out={tmp_path / 'out'}"]
    code = (
        f"import sys; from minimind_sft.__main__ import main; assert main({argv!r}) == 0; "
        "print({'torch', 'lightning', 'transformers', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout.endswith("\nset()\n") and done.stderr == ""
