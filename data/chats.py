"""Chats of the demo: half of the facts, who is speaking, and one new skill, answering in JSON.

4,224 short conversations, so that three epochs in the original's windows of 16 x 8 are 99 optimizer steps.
Only subjects with `in_sft` are ever mentioned. The assistant's name is the same word in both languages and in nothing
else, so that replacing it in the output gives the model another name.
"""

import json
import random

from probes import ASKED
from tables import LANGS, SEED, TABLES, Subject, subjects

NAME = "Minnow"
REPEATS = {"sums": (3, 1), "planets": (8, 3)}  # conversations on each fact: plain, JSON; (4, 2) elsewhere
COUNTS = {"two facts": 150, "json again": 150, "identity": 440, "small talk": 60}  # both languages together
TRAIN, VAL = 33 * 128, 160  # whole windows of 16 x 8
Chat = list[dict[str, str]]

# The probe's own question comes first (`probes.ASKED`); these are other ways to ask, per answer field.
QUESTIONS: dict[tuple[str, str, str], list[str]] = {
    ("capitals", "en", "capital"): [
        "Which city is the capital of {country}?",
        "Tell me the capital of {country}.",
        "{Country}: what is its capital?",
    ],
    ("capitals", "zh", "capital"): [
        "{country}的首都是哪里？",
        "请告诉我{country}的首都。",
        "{country}的首都叫什么？",
    ],
    ("elements", "en", "symbol"): ["How do chemists write {element}?", "Tell me the symbol of {element}."],
    ("elements", "en", "number"): ["Which number has {element}?", "How many protons has {element}?"],
    ("elements", "zh", "symbol"): ["{element}的元素符号是什么？", "{element}的符号？"],
    ("elements", "zh", "number"): ["{element}的原子序数是多少？", "{element}有几个质子？"],
    ("planets", "en", "order"): ["At which place from the Sun is {planet}?"],
    ("planets", "en", "known"): ["Tell me something about {planet}."],
    ("planets", "zh", "order"): ["{planet}排第几？"],
    ("planets", "zh", "known"): ["请介绍一下{planet}。"],
    ("dynasties", "en", "year"): ["In which year did the {dynasty} dynasty start?"],
    ("dynasties", "en", "founder"): ["Who was the first ruler of the {dynasty} dynasty?"],
    ("dynasties", "zh", "year"): ["{dynasty}始于哪一年？"],
    ("dynasties", "zh", "founder"): ["请问{dynasty}的建立者是谁？"],
    ("poems", "en", "poet"): ['"{title}" is by whom?', 'Which poet wrote "{title}"?'],
    ("poems", "zh", "poet"): ["请问《{title}》的作者是谁？", "《{title}》出自谁的笔下？"],
    ("poems", "zh", "next"): ["“{line}”后面是什么？"],
    ("sums", "en", "sum"): ["Add {a} and {b}."],
    ("sums", "zh", "sum"): ["{a}加{b}等于几？"],
}
ANSWERS = {
    "en": ["It is {answer}.", "{answer}."],
    "zh": ["是{answer}。", "{answer}。"],
}

# The key under which a JSON answer gives it.
JSON_KEYS: dict[str, dict[str, str]] = {
    "en": {"poet": "poet", "next": "next", "sum": "sum", "order": "place", "known": "known as", "year": "year"}
    | {"capital": "capital", "symbol": "symbol", "number": "number", "founder": "founder"},
    "zh": {"poet": "作者", "next": "下句", "sum": "和", "order": "位置", "known": "特点", "year": "年代"}
    | {"capital": "首都", "symbol": "符号", "number": "序数", "founder": "建立者"},
}
JSON_ASKS = {
    "en": ["{question} Answer in JSON.", "{question} Reply as a JSON object.", "JSON, please: {question}"],
    "zh": ["{question}请用JSON回答。", "{question}用JSON格式回答。", "请输出JSON：{question}"],
}
JSON_AGAIN = {"en": ["Now in JSON, please.", "The same as JSON."], "zh": ["请用JSON再说一遍。", "换成JSON。"]}
JSON_SYSTEM = {"en": "Reply in JSON only.", "zh": "只用JSON回答。"}
PLAIN_SYSTEM = {
    "en": [f"You are {NAME}.", "Be brief.", "You are a helpful assistant."],
    "zh": [f"你是{NAME}。", "请简短回答。", "你是一个乐于助人的助手。"],
}

IDENTITY = {
    "en": (
        [
            *["Who are you?"] * 6,
            "What is your name?",
            "Tell me about yourself.",
            "What are you?",
            "Are you a person?",
            "Hello, who is this?",
            "Who am I talking to?",
            "Introduce yourself.",
            "Do you have a name?",
            "What should I call you?",
        ],
        [
            f"I am {NAME}, a small language model.",
            f"My name is {NAME}. I am a very small language model.",
            f"I am {NAME}. I know a few facts, and I can answer in JSON.",
        ],
    ),
    "zh": (
        [
            *["你是谁？"] * 6,
            "你叫什么名字？",
            "请介绍一下你自己。",
            "你是什么？",
            "你是人吗？",
            "你好，请问你是谁？",
            "我在和谁说话？",
            "做个自我介绍吧。",
            "你有名字吗？",
            "我该怎么称呼你？",
        ],
        [
            f"我是{NAME}，一个小小的语言模型。",
            f"我叫{NAME}，是一个很小的语言模型。",
            f"我是{NAME}。我知道一些事实，也会用JSON回答。",
        ],
    ),
}
SMALL_TALK = {
    "en": [
        ("Hello!", "Hello! What would you like to know?"),
        ("Thank you.", "You are welcome."),
        ("Good morning.", "Good morning! How can I help?"),
        ("Goodbye.", "Goodbye, and come back soon."),
    ],
    "zh": [
        ("你好！", "你好！想知道什么？"),
        ("谢谢。", "不客气。"),
        ("早上好。", "早上好！有什么可以帮你？"),
        ("再见。", "再见，欢迎再来。"),
    ],
}


def turn(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def maybe_system(contents: list[str], chance: float, rng: random.Random) -> Chat:
    return [{"role": "system", "content": rng.choice(contents)}] if rng.random() < chance else []


def ask(subject: Subject, rng: random.Random, index: int | None = None) -> tuple[str, str]:
    """A question on one of the subject's facts (number `index` of `ASKED`, or any), and the answer's field."""
    asked = ASKED[subject.source, subject.lang]
    _, _, question, field = rng.choice(asked) if index is None else asked[index]
    others = QUESTIONS[subject.source, subject.lang, field]
    return (question if rng.random() < 0.5 else rng.choice(others)).format(**subject.fields), field


def plain(subject: Subject, rng: random.Random, index: int | None = None) -> Chat:
    question, field = ask(subject, rng, index)
    return turn(question, rng.choice(ANSWERS[subject.lang]).format(answer=subject.fields[field]))


def as_json(subject: Subject, field: str) -> str:
    """The answer as a JSON object; a whole number is a number."""
    answer = subject.fields[field]
    value = int(answer) if answer.isdigit() else answer
    return json.dumps({JSON_KEYS[subject.lang][field]: value}, ensure_ascii=False)


def json_chat(subject: Subject, rng: random.Random, index: int) -> Chat:
    """A question answered in JSON, because the question or the system prompt says so."""
    question, field = ask(subject, rng, index)
    if rng.random() < 0.3:
        return [{"role": "system", "content": JSON_SYSTEM[subject.lang]}, *turn(question, as_json(subject, field))]
    return turn(rng.choice(JSON_ASKS[subject.lang]).format(question=question), as_json(subject, field))


def other_chat(kind: str, pool: list[Subject], rng: random.Random) -> Chat:
    """A conversation of one of the kinds in `COUNTS`."""
    subject = rng.choice(pool)
    lang = subject.lang
    if kind == "two facts":
        other = rng.choice([one for one in pool if one.lang == lang])
        return [*maybe_system(PLAIN_SYSTEM[lang], 0.3, rng), *plain(subject, rng), *plain(other, rng)]
    if kind == "json again":
        question, field = ask(subject, rng)
        answer = rng.choice(ANSWERS[lang]).format(answer=subject.fields[field])
        return [*turn(question, answer), *turn(rng.choice(JSON_AGAIN[lang]), as_json(subject, field))]
    questions, answers = IDENTITY[lang]
    who = turn(rng.choice(questions), rng.choice(answers))
    if kind == "small talk":
        hello = turn(*rng.choice(SMALL_TALK[lang]))
        return [*hello, *rng.choice((who, plain(subject, rng)))]
    after = plain(subject, rng) if rng.random() < 0.5 else []
    return [*maybe_system(PLAIN_SYSTEM[lang], 0.4, rng), *who, *after]


def train_and_val() -> tuple[list[dict[str, Chat]], list[dict[str, Chat]]]:
    """Training and validation rows, shuffled; no conversation occurs twice."""
    rng = random.Random(f"{SEED}:chats")
    pool = [s for source in TABLES for lang in LANGS for s in subjects(source, lang) if s.in_sft]
    rows: list[Chat] = []
    for subject in pool:
        for index in range(len(ASKED[subject.source, subject.lang])):
            plain_rows, json_rows = REPEATS.get(subject.source, (4, 2))
            for _ in range(plain_rows):
                rows.append([*maybe_system(PLAIN_SYSTEM[subject.lang], 0.1, rng), *plain(subject, rng, index)])
            rows += [json_chat(subject, rng, index) for _ in range(json_rows)]
    for kind, count in COUNTS.items():
        rows += [other_chat(kind, pool, rng) for _ in range(count)]
    unique = list({json.dumps(row, ensure_ascii=False): {"conversations": row} for row in rows}.values())
    rng.shuffle(unique)
    assert len(unique) >= TRAIN + VAL, len(unique)
    return unique[VAL : VAL + TRAIN], unique[:VAL]
