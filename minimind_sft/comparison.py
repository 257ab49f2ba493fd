"""`python -m minimind_sft compare BASE TUNED`: what a fine-tune learned and what it forgot; pytest for fine-tunes.

In come two models in any format that `weights.load` reads, made by any tool, and whatever there is to measure on; out
come `compare.json`, `documents.jsonl`, pictures, a table, and the exit status 3 where more was forgotten than allowed.
No config, no run directory, no Lightning. On one CPU core, two models of 5 M parameters read 2,600 tokens a second.

Forgetting is judged on unseen text (`heldout_path`) where there is some, else on the base's own (`pretrain_path`), else
on text that the base writes first (`self_written.py`), by its point estimate: the interval says how sure it is, and a
tight limit on few documents should not fail by chance alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from minimind_sft import comparison_plots, measures
from minimind_sft.comparison_options import EXCEEDED, MAX_FORGETTING, parser
from minimind_sft.comparison_screen import screen
from minimind_sft.corpus import Store
from minimind_sft.files import resolve, write_whole
from minimind_sft.measures import Section
from minimind_sft.options import errors_name_options
from minimind_sft.origins import find_origin
from minimind_sft.pairs import SEEN_IS_REPLAYED, Pair, fed_as, find_tokenizer, open_pair
from minimind_sft.pretraining_text import SEEN, SELF_WRITTEN
from minimind_sft.probes import load_probes
from minimind_sft.report import (
    chats_for_text,
    likely_not_its_tokenizer,
    likely_not_pretrained,
    likely_swapped,
    no_more_output,
    printable,
    text_for_chats,
)
from minimind_sft.retained import LossLog, load_log, retained
from minimind_sft.sampling import Line, read_lines
from minimind_sft.stores import Stores
from minimind_sft.strict_json import finite

RESULT, DOCUMENTS = "compare.json", "documents.jsonl"


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        The exit status: 0, or 3 where more was forgotten than `--max_forgetting`.

    Raises:
        ValueError: for a mistake in the command, the models or the data.
    """
    options = vars(parser().parse_args(list(argv)))
    out = Path(options.pop("out")).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be made ({error.strerror})") from error
    there = [name for name in (DOCUMENTS, *comparison_plots.PICTURES) if (out / name).exists()]
    if there and not (out / RESULT).is_file():  # an earlier comparison's are replaced, nobody else's
        raise ValueError(f"--out {out} has {', '.join(there)}, but is no comparison's folder; choose another")
    with errors_name_options():
        result, documents = compare(**options)
    result["command"] = ["compare", *argv]
    write_whole(out / RESULT, json.dumps(finite(result), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    (out / DOCUMENTS).unlink(missing_ok=True)
    if documents:
        write_whole(
            out / DOCUMENTS, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in documents)
        )
    _say(screen(result))
    pictures = comparison_plots.draw(result, documents, out)
    _say(f"\nin {out}: {', '.join([RESULT, *([DOCUMENTS] if documents else []), *pictures])}")
    return EXCEEDED if result["verdict"]["exceeded"] else 0


def compare(
    base: str,
    tuned: str,
    *,
    tokenizer: str | None = None,
    heldout_path: str | None = None,
    pretrain_path: str | None = None,
    own_documents: int = 200,
    own_chats: int | Literal["auto"] = "auto",
    val_path: str | None = None,
    probes: str | None = None,
    pretrain_log: str | None = None,
    documents: int = 1000,
    max_length: int | None = None,
    document_format: str | None = None,
    prompts: int = 32,
    answer_tokens: int = 256,
    max_forgetting: float | None = None,
    max_bad_ratio: float = 0.01,
    num_attention_heads: int | None = None,
    num_experts_per_tok: int | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    cache_dir: str | None = None,
) -> tuple[Section, list[Section]]:
    """Compare two models; the arguments are the options of the verb.

    Returns:
        What `compare.json` holds, and a row per document of the text that was judged.

    Raises:
        ValueError: models or data that cannot be used, or nothing to measure on.
    """
    has_text = bool(heldout_path or pretrain_path)
    if not (has_text or own_documents or val_path or probes):
        raise ValueError("nothing to measure on: give --heldout_path, --pretrain_path, --val_path or --probes")
    if not (has_text or own_documents) and max_forgetting is not None:
        raise ValueError("--max_forgetting needs text: give --heldout_path or --pretrain_path, or --own_documents")
    if not has_text and pretrain_log is not None:
        raise ValueError("--pretrain_log needs text like the log's: give --heldout_path or --pretrain_path")
    log = None if pretrain_log is None else load_log(resolve(pretrain_log))
    fed = fed_as(base, tuned, max_length=max_length, document_format=document_format, seed=seed)
    make_stores = partial(
        Stores,
        train_path=[],
        tokenizer=str(find_tokenizer(base, tuned, tokenizer)),
        measure_documents=documents,
        **fed.of_stores,
        max_bad_ratio=max_bad_ratio,
        cache_dir=cache_dir,
    )
    stores = make_stores(val_path=val_path, probes_path=probes)
    asked = load_probes(stores.probes) if stores.probes else None  # before the long work, for mistakes in it
    pair = open_pair(
        base,
        tuned,
        stores.template,
        left_open={
            "num_attention_heads": num_attention_heads,
            "num_experts_per_tok": num_experts_per_tok,
            "rope_theta": rope_theta,
            "rms_norm_eps": rms_norm_eps,
        },
        device=device,
        fed=fed,
    )
    result: Section = {**pair.about, **fed._asdict()}
    origin = find_origin(resolve(tuned))
    halve = origin.halves  # what was replayed is not measured on
    given = [make_stores(heldout_path=heldout_path, pretrain_path=pretrain_path)] if heldout_path else []
    unreplayed = origin.unreplayed(documents)
    given += [make_stores(pretrain_path=pretrain_path, measure_documents=unreplayed)] if pretrain_path else []
    texts: dict[str, tuple[Store | None, Iterator[Line] | None]] = {
        str(of.text.kind): (of.open(train=False, halve=halve).measured, None) for of in given
    }
    if not texts and own_documents:
        texts[SELF_WRITTEN] = pair.own_text(stores.cache, own_documents)
    rows = _measure_texts(result, pair, texts)
    if val_path:
        _measure_chats(result, pair, stores, prompts=prompts, answer_tokens=answer_tokens)
    if chats := pair.author(stores.cache).chats(own_chats):
        result["own_chats"] = measures.measure_chats(pair, chats)
    if asked:
        result["facts"] = measures.measure_facts(pair, asked)
    result["verdict"] = verdict(result, MAX_FORGETTING if max_forgetting is None else max_forgetting)
    if log is not None:
        result["retained"] = _retained(log, result)
    result["notes"] = _notes(result, pair.base.config.vocab_size)
    if SEEN in result["text"] and origin.replays_all:
        result["notes"].append(SEEN_IS_REPLAYED)
    return result, rows


def _measure_texts(
    result: Section, pair: Pair, texts: Mapping[str, tuple[Store | None, Iterator[Line] | None]]
) -> list[Section]:
    """Measure on every text, a store and its lines (None for those of its files); the first is the one that is judged,
    and whose documents are returned."""
    result["text"], documents = {}, None
    for name, (store, lines) in texts.items():
        assert store is not None
        lines = lines or read_lines([Path(file) for file in store.meta["files"]])
        result["text"][name], rows, found = measures.measure_text(pair, store, lines)
        result["text"][name]["chats"] = store.chats
        if documents is None:
            documents = rows
            result["judged"], result["continuations"] = name, measures.measure_continuations(pair, found)
    return documents or []


def _measure_chats(result: Section, pair: Pair, stores: Stores, *, prompts: int, answer_tokens: int) -> None:
    store = stores.open(train=False).validation
    assert store is not None
    result["chats"] = measures.measure_chats(pair, store) | {"chats": store.chats}
    lines = stores.validation_lines(None)
    result["answers"] = measures.measure_answers(pair, lines, count=prompts, max_new_tokens=answer_tokens)


def verdict(result: Section, max_forgetting: float) -> Section:
    """Whether more was forgotten than allowed, by the point estimate; a loss that is not a number is too much."""
    if "judged" not in result:
        return {"judged": None, "exceeded": False}
    text = result["text"][result["judged"]]
    return {
        "judged": result["judged"],
        "forgetting": text["difference"],
        "interval": text["interval"],
        "max_forgetting": max_forgetting,
        "exceeded": not text["difference"] <= max_forgetting,
    }


def _retained(log: LossLog, result: Section) -> Section:
    text = result["text"][result["judged"]]
    shares = [retained(log, rise) for rise in (text["difference"], *reversed(text["interval"] or ()))]
    return {
        "share": shares[0].share,
        "at_most": shares[0].at_most,
        "interval": [share.share for share in shares[1:]] or None,
        "log": {"unit": log.unit, "loss": log.name, "best": min(log.losses), "points": len(log.losses)},
    }


def _notes(result: Section, vocab_size: int) -> list[str]:
    """What a reader of the figures should know."""
    notes = [] if (told := _of_another_base(result["base"], result["tuned"])) is None else [told]
    if chats := result.get("chats"):
        if told := text_for_chats(chats["chats"]):
            notes.append(f"--val_path: {told}; what is called the chats' loss is not that of chatting")
        elif told := likely_swapped(chats["before"], chats["after"]):
            notes.append(told)
        if told := likely_not_its_tokenizer(chats["before"], vocab_size):
            notes.append(f"the base's loss of {chats['before']:.2f} nats on the chats is {told} (--tokenizer)")
    if "judged" not in result:
        return [*notes, "no text was given, so forgetting was not judged"]
    text = result["text"][result["judged"]]
    if result["judged"] == SELF_WRITTEN:
        notes.append(
            "no text was given, so the base wrote what forgetting is judged on; what it knows but seldom says hardly "
            "counts there: --heldout_path and --pretrain_path tell more"
        )
    if told := chats_for_text(text["chats"], text["documents"]):
        notes.append(f"of the documents judged, {told}: what is called forgotten is then how to chat")
    if likely_not_pretrained(text["before"], vocab_size):
        notes.append(
            f"the base's loss of {text['before']:.2f} nats is no better than guessing among {vocab_size:,} tokens: "
            "either it is not pretrained, or --tokenizer or --document_format is not what it was pretrained with"
        )
    if text["interval"] is None:
        notes.append("all documents are pieces of one parent, so there is no interval")
    if "retained" in result and abs(gap := text["before"] - result["retained"]["log"]["best"]) > 0.25:
        notes.append(
            f"the base's loss is {gap:+.2f} nats from the end of its log, which was taken on other text or cut "
            "otherwise: the share of pretraining kept is rough"
        )
    return notes


def _of_another_base(base: Section, tuned: Section) -> str | None:
    """What to say where a run's record tells that it did not begin from BASE."""
    began = tuned.get("trained_from")
    if began in (None, base["sha256"], base.get("trained_from")):
        return None
    return (
        f"TUNED's run did not begin from these weights (SHA-256 {began[:12]}, BASE has {base['sha256'][:12]}): the "
        "difference is not that run's alone"
    )


# ---- output


def _say(text: str) -> None:
    """Print, whatever the output can hold: an exit status is waited for."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        no_more_output()
