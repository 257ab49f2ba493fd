"""What a base and its fine-tune are measured by: each function takes the two models and gives one section of JSON.

Text, chats and continuations are scored by both models on the same targets (`scoring.py`) and told with an interval
over parent documents within sources (`significance.py`); answers and facts are written greedily. A model against itself
gives exactly 0 forgetting, 0 KL and 100 % agreement. The losses are those that `fit` reports: the same documents, cut
and framed in the same way, the same empty think blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from minimind_sft import answer_format, probes
from minimind_sft.continuations import continuations
from minimind_sft.corpus import Store
from minimind_sft.documents import Documents
from minimind_sft.evaluation import prompts
from minimind_sft.formats import PlainText, parse
from minimind_sft.pairs import Pair
from minimind_sft.readings import perplexity
from minimind_sft.sampling import Line
from minimind_sft.scoring import Scores
from minimind_sft.significance import Resampling, mcnemar

WORST = 10  # documents named

Section = dict[str, Any]


class Origin(NamedTuple):
    """Where a measured document comes from. A document that names no parent is its own."""

    where: str  # file:line
    source: str
    parent: str
    text: str  # empty where the line is a chat


def origins(store: Store, index: np.ndarray, lines: Iterator[Line]) -> list[Origin]:
    """Where documents of a store come from; `lines` are those of its files, read up to the last one wanted."""
    wanted: dict[tuple[str, int], int] = {}
    for place, number in enumerate(index.tolist()):
        wanted[store.meta["files"][store.line_files[number]], int(store.line_numbers[number])] = place
    found: dict[int, Origin] = {}
    for line in lines:
        at = wanted.get((line.file, line.number))
        if at is None:
            continue
        where, row = f"{line.file}:{line.number}", parse(line.text)
        document = row if isinstance(row, PlainText) else PlainText("")
        found[at] = Origin(where, document.source or "", document.parent or where, document.text)
        if len(found) == len(wanted):
            break
    return [found[place] for place in range(len(index))]


def measure_text(pair: Pair, store: Store, lines: Iterator[Line]) -> tuple[Section, list[Section], list[Origin]]:
    """Forgetting on pretraining text.

    Returns:
        The section; a row per document; where the documents come from.
    """
    documents = pair.text(store)
    require_some(documents, "pretraining text")
    found = origins(store, documents.index, lines)
    scores = pair.score_documents(documents, "pretraining text")
    sources = np.array([origin.source for origin in found])
    rows = [_document(origin, scores.at(np.array([place]))) for place, origin in enumerate(found)]
    rose = [row for row in rows if not row["difference"] <= 0]  # what is not a number is the worst
    worst = sorted(rose, key=lambda row: -np.nan_to_num(row["difference"], nan=math.inf))[:WORST]
    by_source = []
    for source in sorted(set(sources.tolist())):
        members = np.flatnonzero(sources == source)
        by_source.append({"source": source, **_figures(scores.at(members), [found[i] for i in members], pair.seed)})
    by_source.sort(key=lambda row: -row["difference"])
    section = _figures(scores, found, pair.seed)
    return section | {"cut": documents.cut, "by_source": by_source, "worst": worst}, rows, found


def measure_chats(pair: Pair, store: Store) -> Section:
    """Loss on what the assistant says in the validation chats; every chat is its own parent."""
    documents = pair.chats(store)
    require_some(documents, "validation chats")
    scores = pair.score_documents(documents, "validation chats")
    found = [Origin(store.where(number), "", store.where(number), "") for number in documents.index.tolist()]
    return _figures(scores, found, pair.seed)


def measure_continuations(pair: Pair, found: Sequence[Origin]) -> Section | None:
    """The tuned model asked in its chat template for second halves, against the base on the raw document; under
    `base_in_chat` what the base itself loses by being asked so."""
    rows = continuations(
        [origin.text for origin in found],
        pair.template,
        document_format=pair.document_format,
        max_length=pair.max_length,
    )
    if not rows.raw:
        return None
    scores = pair.score_rows(rows.raw, rows.chat, "second halves")
    section = _figures(scores, [found[place] for place in rows.places], pair.seed)
    in_chat = float(pair.losses_of(pair.base, rows.chat, "second halves, the base")[1].sum()) / section["tokens"]
    section["base_in_chat"] = {"loss": in_chat, "difference": in_chat - section["before"]}
    return section


def measure_answers(pair: Pair, lines: Iterator[Line], *, count: int, max_new_tokens: int) -> Section | None:
    """Whether greedy answers to `count` of the validation prompts, drawn by the seed, end and repeat."""
    asked = list(prompts(lines, pair.template, pair.max_length))
    drawn = sorted(np.random.default_rng([pair.seed, 0, 3]).permutation(len(asked))[:count].tolist())
    if not drawn:
        return None
    ids = [asked[place]["prompt_ids"] for place in drawn]
    before, after = (
        answer_format.answers(model, pair.template, ids, max_new_tokens=max_new_tokens)
        for model in (pair.base, pair.tuned)
    )
    rows = [
        {name: asked[place][name] for name in ("where", "reference")} | {"before": asdict(old), "after": asdict(new)}
        for place, old, new in zip(drawn, before, after, strict=True)
    ]
    return {
        "prompts": len(drawn),
        "max_new_tokens": max_new_tokens,
        "before": answer_format.shares(before),
        "after": answer_format.shares(after),
        "answers": rows,
    }


def measure_facts(pair: Pair, asked: Sequence[probes.Probe]) -> Section:
    """Facts kept, lost and gained, by name, with McNemar's exact test for each way of asking."""
    before, after = (
        probes.ask(model, pair.template, asked, document_format=pair.document_format)
        for model in (pair.base, pair.tuned)
    )
    section = probes.compare(asked, before, after)
    for group in section["groups"].values():
        group["p_value"] = mcnemar(group["lost"], group["gained"])
    return section


def resampling(found: Sequence[Origin], seed: int) -> Resampling:
    """Draws of whole parents within their sources."""
    return Resampling([origin.parent for origin in found], [origin.source for origin in found], seed=seed)


def _figures(scores: Scores, found: Sequence[Origin], seed: int) -> Section:
    """Losses in nats per token, their difference with its interval, bits per byte, KL and agreement."""
    draws = resampling(found, seed)
    tokens, size, rise = int(scores.tokens.sum()), int(scores.bytes.sum()), scores.after - scores.before
    before, after = (float(column.sum()) / tokens for column in (scores.before, scores.after))
    section: Section = {
        "documents": len(found),
        "parents": draws.clusters,
        "tokens": tokens,
        "bytes": size,
        "before": before,
        "after": after,
        "difference": float(rise.sum()) / tokens,
        "interval": draws.ratio(rise, scores.tokens),
        "perplexity": {"before": perplexity(before), "after": perplexity(after)},
        "kl": float(scores.kl.sum()) / tokens,
        "kl_interval": draws.ratio(scores.kl, scores.tokens),
        "agreement": float(scores.agreed.sum()) / tokens,
    }
    if size:
        bits = math.log(2) * scores.bytes
        section["bits_per_byte"] = {
            "before": float(scores.before.sum()) / math.log(2) / size,
            "after": float(scores.after.sum()) / math.log(2) / size,
            "difference": float(rise.sum()) / math.log(2) / size,
            "interval": draws.ratio(rise, bits),
        }
    return section


def _document(origin: Origin, scores: Scores) -> Section:
    tokens = int(scores.tokens[0])
    before, after, kl = (float(column[0]) / tokens for column in (scores.before, scores.after, scores.kl))
    return {
        "where": origin.where,
        "source": origin.source,
        "parent": origin.parent,
        "begins": " ".join(origin.text[:80].split()),
        "tokens": tokens,
        "bytes": int(scores.bytes[0]),
        "before": before,
        "after": after,
        "difference": after - before,
        "kl": kl,
        "agreement": int(scores.agreed[0]) / tokens,
    }


def require_some(documents: Documents, what: str) -> None:
    """Raises ValueError where there is nothing to score."""
    if not len(documents):
        raise ValueError(f"no document of the {what} has a target within --max_length {documents.max_length}")
