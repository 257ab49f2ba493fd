"""What `demo` says, in English and Chinese."""

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "together": "two runs side by side, each on half of the cores:",
        "run_original": "original: fine-tuning as the original does (original.yaml)",
        "run_held": "held: the same, holding on to the base (sft.yaml)",
        "base": "base",
        "original": "original",
        "held": "held",
        "chats": "chats, nats per token",
        "text": "unseen text, nats per token",
        "forgotten": "forgotten, nats per token",
        "at": "forgotten when the chats were at {loss:.2f}",
        "raw/not_in_sft": "facts the chats do not mention, in raw text",
        "raw/in_sft": "facts the chats mention, in raw text",
        "chat/not_in_sft": "facts the chats do not mention, asked in a chat",
        "chat/in_sft": "facts the chats mention, asked in a chat",
        "lost": "facts lost that the chats do not mention",
        "seconds": "seconds, with everything measured",
        "forgot": "{kind} forgot {count}: {named}",
        "picture": "the picture is {picture}",
        "next": "with your own files:",
    },
    "zh": {
        "together": "两次训练同时进行,各用一半的核心:",
        "run_original": "原版:按原版方法微调(original.yaml)",
        "run_held": "守住:同样的数据,同时守住基座的知识(sft.yaml)",
        "base": "基座",
        "original": "原版",
        "held": "守住",
        "chats": "对话损失(nats/token)",
        "text": "未见文本损失(nats/token)",
        "forgotten": "遗忘(nats/token)",
        "at": "对话损失降到 {loss:.2f} 时的遗忘",
        "raw/not_in_sft": "对话未提到的事实,原文续写",
        "raw/in_sft": "对话提到的事实,原文续写",
        "chat/not_in_sft": "对话未提到的事实,对话提问",
        "chat/in_sft": "对话提到的事实,对话提问",
        "lost": "忘掉的事实(对话未提到)",
        "seconds": "用时(秒,含全部测量)",
        "forgot": "{kind}忘掉了 {count} 条:{named}",
        "picture": "图在 {picture}",
        "next": "换成你自己的文件:",
    },
}

NEXT = """\
python -m minimind_sft fit --config sft.yaml --model.weights BASE.pth --data.tokenizer FOLDER \\
    --data.train_path CHATS.jsonl --data.val_path VAL.jsonl --data.pretrain_path TEXT.jsonl \\
    --data.heldout_path null --data.probes_path null --run_dir runs/mine"""
