"""Fact probes: how one fact is asked for, raw (a text to continue) and as a chat (a question).

`ASKED[source, lang]` lists (name, prompt, question, field of the answer). A prompt is the beginning of a sentence of
the pretraining text; the question is one that the chats ask about their half of the table. Distractors are other
values of the same column.
"""

import random
from collections.abc import Iterator

from tables import LANGS, SEED, TABLES, Subject, subjects

Probe = dict[str, object]

ASKED: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {
    ("capitals", "en"): [
        ("capital of {country}", "The capital of {country} is", "What is the capital of {country}?", "capital")
    ],
    ("capitals", "zh"): [("{country}的首都", "{country}的首都是", "哪座城市是{country}的首都？", "capital")],
    ("elements", "en"): [
        ("symbol of {element}", "The chemical symbol of {element} is", "What is the symbol of {element}?", "symbol"),
        (
            "number of {element}",
            "The atomic number of {element} is",
            "What is the atomic number of {element}?",
            "number",
        ),
    ],
    ("elements", "zh"): [
        ("{element}的元素符号", "{element}的元素符号是", "{element}用什么符号表示？", "symbol"),
        ("{element}的原子序数", "{element}的原子序数是", "{element}是几号元素？", "number"),
    ],
    ("planets", "en"): [
        (
            "place of {planet}",
            "Counting from the Sun, {planet} is planet number",
            "Which planet from the Sun is {planet}?",
            "order",
        ),
        ("fame of {planet}", "{planet} is known as", "What is {planet} known as?", "known"),
    ],
    ("planets", "zh"): [
        ("{planet}的位置", "从太阳数起，{planet}是第", "{planet}是离太阳第几近的行星？", "order"),
        ("{planet}的特点", "{planet}被称为", "{planet}有什么特点？", "known"),
    ],
    ("dynasties", "en"): [
        ("first year of {dynasty}", "The {dynasty} dynasty began in", "When did the {dynasty} dynasty begin?", "year"),
        (
            "founder of {dynasty}",
            "The founder of the {dynasty} dynasty was",
            "Who founded the {dynasty} dynasty?",
            "founder",
        ),
    ],
    ("dynasties", "zh"): [
        ("{dynasty}建立的年代", "{dynasty}建立于", "{dynasty}是哪一年建立的？", "year"),
        ("{dynasty}的建立者", "{dynasty}的建立者是", "{dynasty}是谁建立的？", "founder"),
    ],
    ("poems", "en"): [
        ('poet of "{title}"', 'The poem "{title}" was written by', 'Who wrote the poem "{title}"?', "poet"),
    ],
    ("poems", "zh"): [
        ("《{title}》的作者", "《{title}》的作者是", "《{title}》是谁写的？", "poet"),
        ("“{line}”的下句", "{line}，", "“{line}”的下一句是什么？", "next"),
    ],
    ("sums", "en"): [("{a} + {b}", "{a} + {b} =", "How much is {a} + {b}?", "sum")],
    ("sums", "zh"): [("{a}加{b}", "{a}加{b}等于", "{a}加{b}是多少？", "sum")],
    ("people", "en"): [
        ("birthplace of {name}", "The birthplace of {name} is", "Where was {name} born?", "town"),
        ("trade of {name}", "{name} worked as a", "What was the trade of {name}?", "trade"),
        ("birth year of {name}", "{name} was born in the year", "When was {name} born?", "year"),
    ],
    ("people", "zh"): [
        ("{name}的出生地", "{name}的出生地是", "{name}出生在哪里？", "town"),
        ("{name}的职业", "{name}的职业是", "{name}是做什么的？", "trade"),
        ("{name}的出生年", "{name}出生于", "{name}是哪一年出生的？", "year"),
    ],
}

# Probes per relation and language, half of them in SFT where any is.
COUNT = {"capitals": 40, "elements": 16, "planets": 8, "dynasties": 12, "poems": 18, "sums": 16, "people": 22}


def facts(subject: Subject) -> Iterator[Probe]:
    """Every fact of a subject as a probe, without distractors."""
    for name, prompt, question, field in ASKED[subject.source, subject.lang]:
        yield {
            "name": name.format(**subject.fields),
            "source": subject.source,
            "lang": subject.lang,
            "prompt": prompt.format(**subject.fields),
            "question": question.format(**subject.fields),
            "answer": subject.fields[field],
            "subject": subject.name,
            "in_sft": subject.in_sft,
        }


def choose() -> list[Probe]:
    """A seeded choice of facts, each with three distractors."""
    rows: list[Probe] = []
    for source in TABLES:
        for lang in LANGS:
            rng = random.Random(f"{SEED}:probes:{source}:{lang}")
            by_relation = zip(*(list(facts(subject)) for subject in subjects(source, lang)), strict=True)
            for probes in by_relation:
                answers = sorted({str(probe["answer"]) for probe in probes})
                inside = [probe for probe in probes if probe["in_sft"]]
                outside = [probe for probe in probes if not probe["in_sft"]]
                half = min(COUNT[source] // 2, len(inside))
                for probe in rng.sample(inside, half) + rng.sample(outside, min(COUNT[source] - half, len(outside))):
                    others = [answer for answer in answers if answer != probe["answer"]]
                    rows.append({**probe, "distractors": rng.sample(others, 3)})
    return rows
