"""Make the embedded demo: `python data/make.py` writes everything here but the base, from `facts/*.tsv` and a seed.

`python data/make.py probes chats` runs only those steps. They run in the order people, texts, chats, probes, tokenizer
(it reads what texts and chats wrote). Output is the same byte for byte on every run. The base comes from
`python -m minimind_sft fit --config configs/pretrain.yaml`; it has to be made again when texts or tokenizer change.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

DATA = Path(__file__).parent
sys.path.insert(0, str(DATA))  # so that it also runs as a module and under a test

VOCABULARY = 2560  # tied and 128 wide: 0.33 M of the base's 1.65 M parameters

# MiniMind's added tokens, at their ids. Only the first 21 are special: think and tool marks decode as text.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
    *("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"),
]
MARKS = [
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *(f"<|buffer{i}|>" for i in range(1, 10)),
]


def write_lines(name: str, rows: Iterable[object]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (DATA / name).write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{name:20} {len(lines):6} lines {(DATA / name).stat().st_size / 1e6:7.2f} MB")


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def make_people() -> None:
    import people

    print(f"{'facts/people.tsv':20} {people.write():6} lines")


def make_texts() -> None:
    import texts

    train, heldout = texts.train_and_heldout()
    write_lines("pretrain.jsonl", train)
    write_lines("heldout.jsonl", heldout)


def make_chats() -> None:
    import chats

    train, val = chats.train_and_val()
    write_lines("sft_train.jsonl", train)
    write_lines("sft_val.jsonl", val)


def make_probes() -> None:
    import probes

    write_lines("probes.jsonl", probes.choose())


def tokenizer_text() -> Iterator[str]:
    """What the tokenizer learns from: pretraining text, and chats with their roles' names, which every prompt holds."""
    for row in read_lines("pretrain.jsonl"):
        yield row["text"]
    for row in read_lines("sft_train.jsonl"):
        for message in row["conversations"]:
            yield f"{message['role']}\n{message['content']}"


def make_tokenizer() -> None:
    """A byte-level BPE in which digits and Chinese characters each stand alone.

    No token crosses from one Chinese character into the next, so a prompt's tokens are always the first tokens of the
    text that it begins; and numbers are spelled digit by digit.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\x{3400}-\x{9fff}\x{20000}-\x{3ffff}]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL + MARKS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(), trainer)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in SPECIAL  # the trainer makes all of them special
    out = DATA / "tokenizer"
    out.mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": (DATA / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch([row["text"] for row in read_lines("pretrain.jsonl")]))
    print(f"{'tokenizer/':20} {tokenizer.get_vocab_size():6} tokens; pretrain.jsonl is {tokens} of them")


STEPS = {
    "people": make_people,
    "texts": make_texts,
    "chats": make_chats,
    "probes": make_probes,
    "tokenizer": make_tokenizer,
}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(STEPS)
    if unknown := [name for name in chosen if name not in STEPS]:
        sys.exit(f"no step {unknown[0]!r}; the steps are {', '.join(STEPS)}")
    for name in STEPS:
        if name in chosen:
            STEPS[name]()
