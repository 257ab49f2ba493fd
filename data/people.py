"""200 invented people: nothing but the demo's pretraining text knows them, so what is forgotten stays forgotten.

120 have English names, 80 Chinese ones, put together from the lists in `facts/names.tsv`; each has a birthplace (an
invented place), a trade and a year of birth. Full names are unique, their parts are shared, so that a model has to tell
people apart. Any likeness to a real person is chance.
"""

import csv
import random

from tables import FACTS, SEED, read

COUNT = {"en": 120, "zh": 80}


def invent(rng: random.Random) -> list[dict[str, str]]:
    """Rows of lang, name, town, trade, year; `COUNT` of each language, sorted by name."""
    lists = {row["list"]: row["words"].split() for row in read("names")}
    surnames = [start + end for start in lists["surname_start_en"] for end in lists["surname_end_en"]]
    names = {
        "en": [f"{given} {surname}" for given in lists["given_en"] for surname in surnames],
        "zh": [surname + given for surname in lists["surname_zh"] for given in lists["given_zh"]],
    }
    return [
        {
            "lang": lang,
            "name": name,
            "town": rng.choice(lists[f"town_{lang}"]),
            "trade": rng.choice(lists[f"trade_{lang}"]),
            "year": str(rng.randint(1700, 1990)),
        }
        for lang, count in COUNT.items()
        for name in sorted(rng.sample(names[lang], count))
    ]


def write() -> int:
    """Write `facts/people.tsv`; return the number of rows."""
    rows = invent(random.Random(f"{SEED}:people"))
    with open(FACTS / "people.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)
