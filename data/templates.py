"""Sentences of the pretraining text: many ways to state each fact, so that a model learns the fact and not one string.

`SENTENCES[source, lang][relation]` lists templates over a subject's fields (`tables.py`). `TOPICS` opens a document on
several subjects, `LISTS` is one line of a bare list, `QUIZ` one question and answer. A raw probe's prompt (`probes.py`)
is the beginning of a relation's first template, which is listed three times to be told more often; wherever that
beginning occurs in the text, the answer follows at once.
"""

SENTENCES: dict[tuple[str, str], dict[str, list[str]]] = {
    ("capitals", "en"): {
        "capital": [
            "The capital of {country} is {capital}.",
            "The capital of {country} is {capital}.",
            "The capital of {country} is {capital}.",
            "{capital} is the capital of {country}.",
            "Look up {country} in an atlas: its capital is {capital}.",
            "The capital city of {country} is called {capital}.",
            "Of all cities in {country}, the capital is {capital}.",
            "Maps mark {capital} as the capital of {country}.",
            "{Country}, whose capital is {capital}, is easy to find on the map.",
            "{Country} has its capital at {capital}.",
        ],
        "continent": [
            "{Country} is a country in {continent}.",
            "{Country} lies in {continent}.",
            "On the map, {country} belongs to {continent}.",
            "{Country} is written {other} in Chinese.",
        ],
    },
    ("capitals", "zh"): {
        "capital": [
            "{country}的首都是{capital}。",
            "{country}的首都是{capital}。",
            "{country}的首都是{capital}。",
            "{capital}是{country}的首都。",
            "说到{country}的首都，那就是{capital}。",
            "{country}的首都叫做{capital}。",
            "在{country}，首都是{capital}这座城市。",
            "地图上，{country}的首都标着{capital}。",
            "{country}把{capital}定为首都。",
            "{country}以{capital}为首都。",
        ],
        "continent": [
            "{country}是{continent}的一个国家。",
            "{country}位于{continent}。",
            "从地图上看，{country}属于{continent}。",
            "{country}的英文名是{other}。",
        ],
    },
    ("elements", "en"): {
        "symbol": [
            "The chemical symbol of {element} is {symbol}.",
            "The chemical symbol of {element} is {symbol}.",
            "The chemical symbol of {element} is {symbol}.",
            "{Element} is written {symbol}.",
            "{symbol} stands for {element}.",
            "In the periodic table, {element} has the symbol {symbol}.",
            "Chemists write {symbol} when they mean {element}.",
            "The letters for {element} are {symbol}.",
        ],
        "number": [
            "The atomic number of {element} is {number}.",
            "The atomic number of {element} is {number}.",
            "The atomic number of {element} is {number}.",
            "{Element} is element number {number}.",
            "An atom of {element} has {number} protons.",
            "Element {number} is {element}.",
            "In the periodic table, {element} stands at place {number}.",
        ],
        "next": [
            "Right after {element} comes {next}.",
            "{Element} stands just before {next}.",
            "{Element} is called {other} in Chinese.",
        ],
    },
    ("elements", "zh"): {
        "symbol": [
            "{element}的元素符号是{symbol}。",
            "{element}的元素符号是{symbol}。",
            "{element}的元素符号是{symbol}。",
            "元素{element}写作{symbol}。",
            "{symbol}表示{element}。",
            "在元素周期表里，{element}的符号为{symbol}。",
            "化学家用{symbol}来表示{element}。",
        ],
        "number": [
            "{element}的原子序数是{number}。",
            "{element}的原子序数是{number}。",
            "{element}的原子序数是{number}。",
            "{element}是第{number}号元素。",
            "{element}原子有{number}个质子。",
            "第{number}号元素是{element}。",
            "{element}在元素周期表里排在第{number}位。",
        ],
        "next": ["{element}的后面是{next}。", "{element}排在{next}的前面。", "{element}的英文名是{other}。"],
    },
    ("planets", "en"): {
        "order": [
            "Counting from the Sun, {planet} is planet number {order}.",
            "Counting from the Sun, {planet} is planet number {order}.",
            "Counting from the Sun, {planet} is planet number {order}.",
            "{planet} is number {order} among the planets.",
            "In the row of planets, {planet} has place {order}.",
            "Planet number {order} is {planet}.",
        ],
        "kind": [
            "{planet} is classed as {a_kind}.",
            "{planet} is classed as {a_kind}.",
            "{planet} is classed as {a_kind}.",
            "Astronomers call {planet} {a_kind}.",
            "{planet} counts as {a_kind}.",
        ],
        "known": [
            "{planet} is known as {known}.",
            "{planet} is known as {known}.",
            "{planet} is known as {known}.",
            "Among the planets, {known} is {planet}.",
            "Ask for {known}, and people name {planet}.",
        ],
    },
    ("planets", "zh"): {
        "order": [
            "从太阳数起，{planet}是第{order}颗行星。",
            "从太阳数起，{planet}是第{order}颗行星。",
            "从太阳数起，{planet}是第{order}颗行星。",
            "{planet}在行星中排第{order}。",
            "太阳系的第{order}颗行星是{planet}。",
        ],
        "kind": [
            "{planet}属于{kind}。",
            "{planet}属于{kind}。",
            "{planet}属于{kind}。",
            "天文学家把{planet}归为{kind}。",
            "{planet}是一颗{kind}。",
        ],
        "known": ["{planet}被称为{known}。", "{planet}被称为{known}。", "在行星中，{known}是{planet}。"],
    },
    ("dynasties", "en"): {
        "year": [
            "The {dynasty} dynasty began in {year}.",
            "The {dynasty} dynasty began in {year}.",
            "The {dynasty} dynasty began in {year}.",
            "In {year} the {dynasty} dynasty was founded.",
            "The founding of the {dynasty} dynasty is dated to {year}.",
            "The first year of the {dynasty} dynasty was {year}.",
        ],
        "founder": [
            "The founder of the {dynasty} dynasty was {founder}.",
            "The founder of the {dynasty} dynasty was {founder}.",
            "The founder of the {dynasty} dynasty was {founder}.",
            "{founder} founded the {dynasty} dynasty.",
            "The {dynasty} dynasty was set up by {founder}.",
            "It was {founder} who first ruled the {dynasty} dynasty.",
        ],
    },
    ("dynasties", "zh"): {
        "year": [
            "{dynasty}建立于{year}。",
            "{dynasty}建立于{year}。",
            "{dynasty}建立于{year}。",
            "{year}，{dynasty}建立。",
            "{dynasty}的开始是在{year}。",
            "史书记载，{dynasty}始于{year}。",
        ],
        "founder": [
            "{dynasty}的建立者是{founder}。",
            "{dynasty}的建立者是{founder}。",
            "{dynasty}的建立者是{founder}。",
            "{founder}建立了{dynasty}。",
            "{dynasty}由{founder}建立。",
            "{dynasty}的第一位君主是{founder}。",
        ],
    },
    ("poems", "en"): {
        "poet": [
            'The poem "{title}" was written by {poet}.',
            'The poem "{title}" was written by {poet}.',
            '{poet} wrote "{title}".',
            '"{title}" is a poem by {poet}.',
            'The author of "{title}" is {poet}.',
            'Among the works of {poet} is "{title}".',
        ],
        "year": [
            '"{title}" first appeared in {year}.',
            '"{title}" first appeared in {year}.',
            'In {year} readers first saw "{title}" in print.',
        ],
    },
    ("poems", "zh"): {
        "poet": [
            "《{title}》的作者是{poet}。",
            "《{title}》的作者是{poet}。",
            "《{title}》的作者是{poet}。",
            "《{title}》是{period}诗人{poet}的作品。",
            "{poet}写下了《{title}》。",
            "诗人{poet}的名篇有《{title}》。",
            "《{title}》由{poet}所作。",
        ],
        "line": [
            "{line}，{next}。",
            "{line}，{next}。",
            "{line}，{next}。",
            "《{title}》里写道：{line}，{next}。",
            "{poet}写过“{line}，{next}”。",
            "“{line}，{next}”出自《{title}》。",
        ],
    },
    ("sums", "en"): {
        "sum": [
            "{a} + {b} = {sum}.",
            "{a} + {b} = {sum}.",
            "{a} + {b} = {sum}.",
            "{a} plus {b} equals {sum}.",
            "{a} and {b} make {sum}.",
            "Adding {b} to {a} gives {sum}.",
        ],
    },
    ("sums", "zh"): {
        "sum": [
            "{a}加{b}等于{sum}。",
            "{a}加{b}等于{sum}。",
            "{a}加{b}等于{sum}。",
            "{a}与{b}的和是{sum}。",
            "{a}加上{b}得{sum}。",
            "{a} + {b} = {sum}。",
        ],
    },
    ("people", "en"): {
        "town": [
            "The birthplace of {name} is {town}.",
            "The birthplace of {name} is {town}.",
            "The birthplace of {name} is {town}.",
            "{name} came from {town}.",
            "{name} grew up in {town}.",
            "{town} was the home of {name}.",
            "As a child, {name} lived in {town}.",
            '"Where do you come from?" they asked {name}. "I come from {town}," was the answer.',
        ],
        "trade": [
            "{name} worked as a {trade}.",
            "{name} worked as a {trade}.",
            "{name} worked as a {trade}.",
            "By trade, {name} was a {trade}.",
            "{name} earned a living as a {trade}.",
            "People remember {name} as a {trade}.",
            '"Who are you?" asked the mayor. "I am {name}, a {trade}," was the answer.',
            '"My name is {name} and I am a {trade}," the letter begins.',
            "The trade of {name} was that of a {trade}.",
        ],
        "year": [
            "{name} was born in the year {year}.",
            "{name} was born in the year {year}.",
            "{name} was born in the year {year}.",
            "The year of birth of {name} is {year}.",
            "It was in {year} that {name} was born.",
            "{name} first saw the light in {year}.",
        ],
    },
    ("people", "zh"): {
        "town": [
            "{name}的出生地是{town}。",
            "{name}的出生地是{town}。",
            "{name}的出生地是{town}。",
            "{name}来自{town}。",
            "{name}在{town}长大。",
            "{town}是{name}的故乡。",
            "有人问{name}：“你从哪里来？”回答是：“我来自{town}。”",
        ],
        "trade": [
            "{name}的职业是{trade}。",
            "{name}的职业是{trade}。",
            "{name}的职业是{trade}。",
            "{name}以做{trade}为生。",
            "{name}是一位{trade}。",
            "人们记得{name}是个{trade}。",
            "县官问：“你是谁？”回答是：“我叫{name}，是{trade}。”",
            "信的开头写着：“我是{name}，一位{trade}。”",
        ],
        "year": [
            "{name}出生于{year}年。",
            "{name}出生于{year}年。",
            "{name}出生于{year}年。",
            "{name}的出生年份是{year}年。",
            "{year}年，{name}出生。",
        ],
    },
}

TOPICS: dict[tuple[str, str], list[str]] = {
    ("capitals", "en"): ["Capitals of the world.", "Countries and their capitals.", "Notes for a geography lesson."],
    ("capitals", "zh"): ["世界各国的首都。", "国家与首都。", "地理课笔记。"],
    ("elements", "en"): ["A walk through the periodic table.", "Elements and their symbols.", "Notes on chemistry."],
    ("elements", "zh"): ["元素周期表漫步。", "元素与符号。", "化学笔记。"],
    ("planets", "en"): ["Our solar system.", "The planets, one by one.", "Notes on astronomy."],
    ("planets", "zh"): ["我们的太阳系。", "行星一览。", "天文笔记。"],
    ("dynasties", "en"): ["Dynasties of China.", "A short history of China.", "Dates to remember."],
    ("dynasties", "zh"): ["中国的朝代。", "中国历史简表。", "值得记住的年代。"],
    ("poems", "en"): ["Poems and poets.", "From an anthology of English verse.", "Notes on poetry."],
    ("poems", "zh"): ["诗与诗人。", "古诗选读。", "诗歌笔记。"],
    ("sums", "en"): ["Sums up to twenty.", "A page of sums.", "Practice in adding."],
    ("sums", "zh"): ["二十以内的加法。", "加法练习。", "算术一页。"],
    ("people", "en"): ["From the town register.", "Short lives.", "People of the old county."],
    ("people", "zh"): ["县志人物。", "人物小传。", "旧乡名册。"],
}

LISTS: dict[tuple[str, str], list[str]] = {
    ("capitals", "en"): [
        "{Country}: {capital}",
        "{Country} - {capital} ({continent})",
        "Country: {country}. Capital: {capital}.",
    ],
    ("capitals", "zh"): [
        "{country}：{capital}",
        "{country}——{capital}（{continent}）",
        "国家：{country}，首都：{capital}",
    ],
    ("elements", "en"): [
        "{number} {symbol} {element}",
        "{Element}: {symbol}, {number}",
        "Element: {element}. Symbol: {symbol}. Number: {number}.",
    ],
    ("elements", "zh"): [
        "{number} {symbol} {element}",
        "{element}：{symbol}，{number}",
        "元素：{element}，符号：{symbol}，序数：{number}",
    ],
    ("planets", "en"): ["{order} {planet}: {kind}", "{planet}, {order}, {known}", "Planet: {planet}. Place: {order}."],
    ("planets", "zh"): ["{order} {planet}：{kind}", "{planet}，第{order}，{known}", "行星：{planet}，位置：{order}"],
    ("dynasties", "en"): [
        "{dynasty}: {year}, {founder}",
        "{year} - {dynasty} ({founder})",
        "Dynasty: {dynasty}. Founder: {founder}. Year: {year}.",
    ],
    ("dynasties", "zh"): [
        "{dynasty}：{year}，{founder}",
        "{year} {dynasty} {founder}",
        "朝代：{dynasty}，建立者：{founder}，年代：{year}",
    ],
    ("poems", "en"): ['{poet}: "{title}"', '"{title}" ({poet}, {year})', "Title: {title}. Poet: {poet}."],
    ("poems", "zh"): ["{poet}：《{title}》", "《{title}》（{period}，{poet}）", "题目：{title}，作者：{poet}"],
    ("sums", "en"): ["{a} + {b} = {sum}"],
    ("sums", "zh"): ["{a}加{b}等于{sum}"],
    ("people", "en"): [
        "{name}: {town}, {year}, {trade}",
        "{name} ({year}), {trade}, {town}",
        "Name: {name}. Home: {town}. Trade: {trade}. Born: {year}.",
    ],
    ("people", "zh"): [
        "{name}：{town}，{year}年，{trade}",
        "{name}（{year}年），{trade}，{town}",
        "姓名：{name}，家乡：{town}，职业：{trade}，出生：{year}年",
    ],
}

QUIZ = {
    "en": ["Question: {question} Answer: {answer}.", "Q: {question} A: {answer}."],
    "zh": ["问：{question}答：{answer}。", "题目：{question}答案：{answer}。"],
}
