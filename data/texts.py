"""Pretraining documents out of subjects and templates: `{"text", "source", "parent"}`.

A *round* goes once through a table in one language in a seeded order and writes every subject into some document, so
every fact is told equally often. Four shapes: a portrait (one subject, every relation, one of them twice), a survey (a
topic, then a sentence or two on each of a few subjects), a quiz and a list. `ROUNDS` sets how often a table is told.

The quiz shapes matter: without them the base knows facts only as sentences, and 60 steps of SFT could not reach them
through a question (32 % right on the facts that SFT itself repeats).

Held-out documents come from rounds of their own. Facts and forms are the same, their combinations are not: the loss on
them measures what is known, not which documents were memorised. None of them occurs in the training text.
"""

import random
from collections.abc import Iterator

from probes import ASKED
from tables import LANGS, SEED, TABLES, Subject, subjects
from templates import LISTS, QUIZ, SENTENCES, TOPICS

ROUNDS = {"capitals": 24, "elements": 24, "planets": 36, "dynasties": 28, "poems": 26, "sums": 36, "people": 26}
HELDOUT_PER_TABLE = 24
GROUP = {"sums": 8, "people": 3}  # subjects in a document on several of them; 4 otherwise


class Teller:
    """Chooses what to say, evenly: a fact's forms come round in a shuffled order before one is used again."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.bags: dict[tuple[str, str], list[str]] = {}

    def draw(self, subject: Subject, what: str, choices: list[str]) -> str:
        """The next of `choices` in this subject's bag for `what`."""
        bag = self.bags.setdefault((subject.name, what), [])
        if not bag:
            bag += self.rng.sample(choices, len(choices))
        return bag.pop()

    def sentence(self, subject: Subject, relation: str) -> str:
        """The relation in one of its forms that this subject can fill (oganesson has no next element)."""
        forms = SENTENCES[subject.source, subject.lang][relation]
        while True:
            try:
                return self.draw(subject, relation, forms).format(**subject.fields)
            except KeyError:
                continue

    def portrait(self, subject: Subject) -> str:
        """Every relation in a random order, and one of them again."""
        relations = list(SENTENCES[subject.source, subject.lang])
        order = [*self.rng.sample(relations, len(relations)), self.draw(subject, "again", relations)]
        return join(list(dict.fromkeys(self.sentence(subject, relation) for relation in order)), subject.lang)

    def survey(self, group: list[Subject]) -> str:
        """Sometimes a topic, then one or two sentences on each subject."""
        first = group[0]
        told = [self.rng.choice(TOPICS[first.source, first.lang])] if self.rng.random() < 0.5 else []
        for subject in group:
            relations = list(SENTENCES[subject.source, subject.lang])
            for _ in range(self.rng.choice((1, 2)) if len(relations) > 1 else 1):
                told.append(self.sentence(subject, self.draw(subject, "survey", relations)))
        return join(told, first.lang)

    def listing(self, group: list[Subject]) -> str:
        """A topic, then a line for each subject, all in one form."""
        first = group[0]
        line = self.rng.choice(LISTS[first.source, first.lang])
        lines = (line.format(**subject.fields) for subject in group)
        return "\n".join([self.rng.choice(TOPICS[first.source, first.lang]), *lines])

    def quiz(self, group: list[Subject]) -> str:
        """A question and its bare answer on each subject."""
        lines = []
        mark = self.rng.choice(QUIZ[group[0].lang])
        for subject in group:
            asked = {question: field for _, _, question, field in ASKED[subject.source, subject.lang]}
            question = self.draw(subject, "quiz", list(asked))
            answer = subject.fields[asked[question]]
            lines.append(mark.format(question=question.format(**subject.fields), answer=answer))
        return "\n".join(lines)

    def one_round(self, pool: list[Subject]) -> Iterator[str]:
        """Documents that between them tell of every subject once."""
        order = self.rng.sample(pool, len(pool))
        single = 0.0 if pool[0].source == "sums" else 0.6
        while order:
            if self.rng.random() < single:
                yield self.portrait(order.pop())
                continue
            take = min(len(order), GROUP.get(pool[0].source, 4) + self.rng.choice((-1, 0, 1)))
            group = [order.pop() for _ in range(take)]
            yield self.rng.choices((self.survey, self.quiz, self.listing), (45, 40, 15))[0](group)


def join(sentences: list[str], lang: str) -> str:
    return (" " if lang == "en" else "").join(sentences)


def train_and_heldout() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training documents, shuffled, and the held-out ones; no text occurs twice."""
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for source in TABLES:
        for lang in LANGS:
            rng = random.Random(f"{SEED}:text:{source}:{lang}")
            teller = Teller(rng)
            pool = subjects(source, lang)
            fresh = []
            while len(fresh) < HELDOUT_PER_TABLE:
                fresh += [text for text in dict.fromkeys(teller.one_round(pool)) if text not in fresh]
            kept = rng.sample(fresh, HELDOUT_PER_TABLE)
            told = [text for _ in range(ROUNDS[source]) for text in teller.one_round(pool)]
            texts = [text for text in dict.fromkeys(told) if text not in kept]
            for into, some in ((heldout, kept), (train, texts)):
                into += [{"text": t, "source": source, "parent": f"{source}-{lang}-{i}"} for i, t in enumerate(some)]
    for documents in (train, heldout):
        random.Random(f"{SEED}:order").shuffle(documents)
    return train, heldout
