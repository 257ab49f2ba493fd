"""200 invented people: nothing outside the demo's pretraining text knows them, so what is forgotten stays forgotten.

120 have English names, 80 Chinese ones; each has a birthplace (an invented place), a trade and a year of birth. Full names are unique,
parts of names are shared, so that a model has to tell people apart. Any likeness to a real person is chance.
"""

import csv
import random

from tables import FACTS, SEED

GIVEN = (
    "Alder Beryl Cassia Dorian Elowen Fenwick Gwenda Hester Idris Jorah Kezia Linnet Merrin Nesta Orla Perrin Quilla Rowan Sable Tamsin "
    "Ursa Verity Wilder Xanthe Yarrow Zillah Bram Corin Damaris Ebba"
).split()
SURNAME_STARTS = "Orro Tarn Velli Brack Quen Haver Pell Sorro Dunna Millo Grav Kest".split()
SURNAME_ENDS = "by wick stone croft dell mere lock shaw pike garth".split()
TOWNS = (
    "Kelwick Marrowby Stonefen Ashcombe Tilbrook Hollowmere Gullport Fernhythe Oakrill Saltmarket Windlow Brindle Copperhay Dunsea Eastwater "
    "Foxholm Greywell Haddock Ivybank Junewick Kingsrill Larkhurst Mossgate Netherby Owlpen Pinefold Quarrytown Redmoor Swanlake Thornwell"
).split()
TRADES = (
    "glassblower clockmaker weaver baker sailor beekeeper printer tailor carpenter shepherd potter teacher miller blacksmith bookbinder "
    "painter doctor gardener ferryman violinist mapmaker cook lawyer stonemason candlemaker fisherman surgeon"
).split()
SURNAMES_ZH = list("钱孙郑冯卫蒋沈韩秦许吕施孔曹严魏陶姜谢邹")
NAMES_ZH = "砚秋 云岫 拾月 听澜 望舒 青禾 怀瑾 竹溪 知夏 景行 晚舟 若谷 南星 疏桐 松年 雪堂 鹤亭 半夏 石泉 临渊".split()
TOWNS_ZH = "青石镇 白鹿村 柳河镇 云台乡 枫林渡 桃源堡 铁桥镇 竹山村 雁门集 石塘湾 梅岭镇 双溪村 沙洲渡 古井镇 松风寨 月牙湾 红土坡 清泉镇 荷塘村 北斗镇".split()
TRADES_ZH = "木匠 铁匠 裁缝 渔夫 医生 画师 教师 船夫 厨师 石匠 药商 茶农 织工 钟表匠 琴师 牧羊人 印刷工 邮差 灯塔看守 养蜂人".split()


def invent(rng: random.Random) -> list[dict[str, str]]:
    """120 English and 80 Chinese rows of lang, name, town, trade, year; full names are unique."""
    surnames = [start + end for start in SURNAME_STARTS for end in SURNAME_ENDS]
    names = {"en": [f"{given} {surname}" for given in GIVEN for surname in surnames]}
    names["zh"] = [surname + name for surname in SURNAMES_ZH for name in NAMES_ZH]
    places = {"en": (120, TOWNS, TRADES), "zh": (80, TOWNS_ZH, TRADES_ZH)}
    return [
        {
            "lang": lang,
            "name": name,
            "town": rng.choice(towns),
            "trade": rng.choice(trades),
            "year": str(rng.randint(1700, 1990)),
        }
        for lang, (count, towns, trades) in places.items()
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
