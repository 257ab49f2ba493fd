"""Pretraining documents out of subjects and templates: `{"text", "source", "parent"}`.

One *round* goes once through a table in one language in a seeded order and writes every subject into some document, so every fact is told equally
often whatever its table's order. Four shapes: a portrait (one subject, every relation, one of them twice), a survey (a topic, then a sentence or two
on each of a few subjects), a list, and a quiz. `ROUNDS` sets how often a table is told: more where a fact is harder to hold.

Held-out documents are rounds of their own. Facts and sentence forms are the same, their combinations are not: loss on them measures what is known,
not what was memorised word for word. None occurs in the training text.
"""

import random
from collections.abc import Iterator

from tables import LANGS, SEED, TABLES, Subject, subjects
from templates import LISTS, SENTENCES, TOPICS

ROUNDS = {"capitals": 24, "elements": 20, "planets": 40, "dynasties": 36, "poems": 30, "sums": 16, "people": 26}
HELDOUT_PER_TABLE = 24
GROUP = {"sums": 8, "people": 3}  # subjects in a document on several of them; 4 otherwise


def sentence(subject: Subject, relation: str, rng: random.Random) -> str:
    """One of the relation's templates that the subject can fill (oganesson has no next element)."""
    templates = SENTENCES[subject.source, subject.lang][relation]
    while True:
        try:
            return rng.choice(templates).format(**subject.fields)
        except KeyError:
            continue


def join(sentences: list[str], lang: str) -> str:
    return (" " if lang == "en" else "").join(sentences)


def portrait(subject: Subject, rng: random.Random) -> str:
    """Every relation in a random order, and one of them again."""
    relations = list(SENTENCES[subject.source, subject.lang])
    order = rng.sample(relations, len(relations)) + [rng.choice(relations)]
    told: list[str] = []
    for relation in order:
        text = sentence(subject, relation, rng)
        if text not in told:
            told.append(text)
    return join(told, subject.lang)


def survey(group: list[Subject], rng: random.Random) -> str:
    """Sometimes a topic, then one or two sentences on each subject."""
    first = group[0]
    told = [rng.choice(TOPICS[first.source, first.lang])] if rng.random() < 0.5 else []
    for subject in group:
        relations = list(SENTENCES[subject.source, subject.lang])
        told += [sentence(subject, r, rng) for r in rng.sample(relations, min(len(relations), rng.choice((1, 2))))]
    return join(told, first.lang)


def listing(group: list[Subject], rng: random.Random) -> str:
    first = group[0]
    line = rng.choice(LISTS[first.source, first.lang])
    return "\n".join([rng.choice(TOPICS[first.source, first.lang]), *(line.format(**s.fields) for s in group)])


def one_round(pool: list[Subject], rng: random.Random) -> Iterator[str]:
    """Documents that between them tell of every subject once."""
    order = rng.sample(pool, len(pool))
    size = GROUP.get(pool[0].source, 4)
    single = 0.0 if pool[0].source == "sums" else 0.6
    while order:
        if rng.random() < single:
            yield portrait(order.pop(), rng)
            continue
        take = min(len(order), size + rng.choice((-1, 0, 1)))
        group = [order.pop() for _ in range(take)]
        yield (listing if rng.random() < 0.25 else survey)(group, rng)


def write_texts() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training documents, shuffled, and the held-out ones; no text occurs twice."""
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for source in TABLES:
        for lang in LANGS:
            rng = random.Random(f"{SEED}:text:{source}:{lang}")
            pool = subjects(source, lang)
            fresh = []
            while len(fresh) < HELDOUT_PER_TABLE:
                fresh += [text for text in dict.fromkeys(one_round(pool, rng)) if text not in fresh]
            kept = rng.sample(fresh, HELDOUT_PER_TABLE)
            told = [text for _ in range(ROUNDS[source]) for text in one_round(pool, rng)]
            texts = [text for text in dict.fromkeys(told) if text not in kept]
            for into, some in ((heldout, kept), (train, texts)):
                into += [{"text": t, "source": source, "parent": f"{source}-{lang}-{i}"} for i, t in enumerate(some)]
    for documents in (train, heldout):
        random.Random(f"{SEED}:order").shuffle(documents)
    return train, heldout
