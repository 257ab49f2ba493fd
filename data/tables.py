"""The facts: what the demo's base is taught, and which half of it the chats may repeat.

`facts/*.tsv` hold public facts typed from general knowledge, and the invented people (`people.py`); sums are made here.
A `Subject` is one row of a table in one language (Peru in English, 秘鲁 in Chinese); its `fields` fill the templates of
`templates.py`, `probes.py` and `chats.py`.

The split is by subject, not by sentence: a country is in SFT in both languages or in neither, 7 + 5 goes with 5 + 7,
and no invented person is ever in SFT. What a tuned model still knows about the other half, it knows from pretraining.
"""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

SEED = 42
FACTS = Path(__file__).parent / "facts"
LANGS = ("en", "zh")


@dataclass(frozen=True)
class Subject:
    """One thing that facts are about, in one language.

    Attributes:
        source: the table's name.
        lang: `en` or `zh`.
        name: how texts call it ("Peru"); a fact is about this string.
        fields: what templates may refer to.
        in_sft: whether the chats may mention it.
    """

    source: str
    lang: str
    name: str
    fields: dict[str, str]
    in_sft: bool


def read(name: str) -> list[dict[str, str]]:
    """Rows of `facts/<name>.tsv`, keyed by its header line."""
    with open(FACTS / f"{name}.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def half(source: str, keys: list[str]) -> set[str]:
    """The seeded half of a table that SFT may mention."""
    order = sorted(set(keys))
    random.Random(f"{SEED}:{source}").shuffle(order)
    return set(order[: len(order) // 2])


def capitals(lang: str) -> list[Subject]:
    rows = read("capitals")
    chosen = half("capitals", [row["country_en"] for row in rows])
    subjects = []
    for row in rows:
        country = row[f"country_{lang}"]
        fields = {
            "country": country,
            "Country": country[0].upper() + country[1:],
            "capital": row[f"capital_{lang}"],
            "continent": row[f"continent_{lang}"],
            "other": row["country_zh" if lang == "en" else "country_en"].removeprefix("the "),
        }
        subjects.append(Subject("capitals", lang, country.removeprefix("the "), fields, row["country_en"] in chosen))
    return subjects


def elements(lang: str) -> list[Subject]:
    rows = read("elements")
    chosen = half("elements", [row["symbol"] for row in rows])
    subjects = []
    for i, row in enumerate(rows):
        name = row[f"name_{lang}"]
        fields = {
            "element": name,
            "Element": name[0].upper() + name[1:],
            "symbol": row["symbol"],
            "number": row["number"],
            "other": row["name_zh" if lang == "en" else "name_en"],
        }
        if i + 1 < len(rows):
            fields["next"] = rows[i + 1][f"name_{lang}"]
        subjects.append(Subject("elements", lang, name, fields, row["symbol"] in chosen))
    return subjects


def planets(lang: str) -> list[Subject]:
    rows = read("planets")
    chosen = half("planets", [row["name_en"] for row in rows])
    return [
        Subject(
            "planets",
            lang,
            row[f"name_{lang}"],
            {
                "planet": row[f"name_{lang}"],
                "order": row["order"],
                "kind": row[f"kind_{lang}"],
                "a_kind": ("an " if row["kind_en"][0] in "aeiou" else "a ") + row["kind_en"],
                "known": row[f"known_{lang}"],
            },
            row["name_en"] in chosen,
        )
        for row in rows
    ]


def year_text(year: int, lang: str) -> str:
    """-221 -> `221 BC` / `公元前221年`; before 1000 BC the chronology is approximate, except for Western Zhou."""
    about = year in (-2070, -1600)
    if lang == "zh":
        return ("约" if about else "") + ("公元前" if year < 0 else "公元") + f"{abs(year)}年"
    return ("about " if about else "") + (f"{-year} BC" if year < 0 else f"AD {year}")


def dynasties(lang: str) -> list[Subject]:
    rows = read("dynasties")
    chosen = half("dynasties", [row["name_en"] for row in rows])
    return [
        Subject(
            "dynasties",
            lang,
            row[f"name_{lang}"],
            {
                "dynasty": row[f"name_{lang}"],
                "year": year_text(int(row["year"]), lang),
                "founder": row[f"founder_{lang}"],
            },
            row["name_en"] in chosen,
        )
        for row in rows
    ]


def poems(lang: str) -> list[Subject]:
    rows = read(f"poems_{lang}")
    chosen = half(f"poems_{lang}", [row["title"] for row in rows])
    return [Subject("poems", lang, row["title"], row, row["title"] in chosen) for row in rows]


def sums(lang: str) -> list[Subject]:
    pairs = [(a, b) for a in range(21) for b in range(21 - a)]
    chosen = half("sums", [f"{min(pair)}+{max(pair)}" for pair in pairs])
    return [
        Subject(
            "sums",
            lang,
            f"{a} + {b}" if lang == "en" else f"{a}加{b}",
            {"a": str(a), "b": str(b), "sum": str(a + b)},
            f"{min(a, b)}+{max(a, b)}" in chosen,
        )
        for a, b in pairs
    ]


def people(lang: str) -> list[Subject]:
    return [
        Subject("people", lang, row["name"], {key: row[key] for key in ("name", "town", "trade", "year")}, False)
        for row in read("people")
        if row["lang"] == lang
    ]


TABLES = {
    "capitals": capitals,
    "elements": elements,
    "planets": planets,
    "dynasties": dynasties,
    "poems": poems,
    "sums": sums,
    "people": people,
}


def subjects(source: str, lang: str) -> list[Subject]:
    """All subjects of one table in one language, in the table's order."""
    return TABLES[source](lang)
