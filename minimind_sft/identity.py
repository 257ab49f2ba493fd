"""What a checkpoint and the run that goes on from it have to agree on: which documents come in which window, and which
ones are measured on. Windows that differed would train some documents twice and others never; readings of other
documents than the base's would make up a forgetting. Documents are known by their tokens, wherever their files lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from minimind_sft.forgetting import CHAT, OWN_CHATS, PRETRAIN

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule

READ, FILES = "text to read", "files"  # the latter are told, not compared: they may move
MEASURED = {
    CHAT: "the validation chats (data.val_path, data.val_fraction)",
    PRETRAIN: "the text that forgetting is measured on (data.heldout_path, data.pretrain_path, data.measure_documents, "
    "data.own_documents, data.document_format)",
    OWN_CHATS: "the base's own chats (data.own_chats)",
}


def of_training(data: SFTDataModule) -> dict[str, Any]:
    """What decides which documents come in which window, and which of their tokens."""
    documents, prompts = data.plan.documents, data.stores.prompts
    return {
        "documents": len(documents),
        "sample": documents.fingerprint,
        FILES: documents.store.meta["files"],
        "targets": data.plan.most_targets,
        "supervises": data.stores.supervises,
        "window_size": data.plan.window_size,
        "seed": data.seed,
        "shuffle": data.shuffle,
        "max_length": data.max_length,
        "too_long": data.too_long,
        "empty_think_ratio": data.empty_think_ratio,
        "replay": _of_replay(data),
        READ: _of_text_to_read(data),
        "system_prompts": None if prompts is None else prompts.texts,
        "system_ratio": None if prompts is None else data.system_ratio,
    }


def _of_replay(data: SFTDataModule) -> str | None:
    if data.plan.replay is None:
        return None
    pieces = f", in pieces of {data.replay_length}" if data.replay_length else ""
    in_chat = f", {data.replay_in_chat:g} of it in a chat" if data.replay_in_chat else ""
    return f"{data.replay_ratio:g} of {data.plan.replay.documents.fingerprint}{pieces}{in_chat}"


def _of_text_to_read(data: SFTDataModule) -> str | None:
    """What the optimizer's basis, the pull and other terms were read from."""
    return None if data.spare_text is None or not data.reads_text else data.spare_text.fingerprint


def of_measured(data: SFTDataModule) -> dict[str, list[Any]]:
    """Which documents are measured on and how they are cut, by the names of `data.evaluation`."""
    return {
        name: [documents.fingerprint, documents.max_length, documents.too_long, data.stores.supervises]
        for name, documents in data.evaluation.items()
    }


def check_training(data: SFTDataModule, saved: dict[str, Any]) -> None:
    """Refuse to resume on another plan.

    Raises:
        ValueError: naming every difference.
    """
    now = of_training(data)
    if None in (now[READ], saved.get(READ)):  # a pull may come or go in mid-run; its text may not change
        del now[READ]
    changed = [
        f"{name} was {_told(name, saved)}, is {_told(name, now)}"
        for name, value in now.items()
        if name != FILES and name in saved and saved[name] != value  # older checkpoints do not tell everything
    ]
    if changed:
        raise ValueError(
            f"cannot resume: the checkpoint's data differs ({'; '.join(changed)}). `sample` stands for what the files "
            "hold, the caps (data.max_mb and others), data.seed, the tokenizer and what leaves training, such as "
            "validation chats; `targets` for which of their messages are learned; `text to read` for the pretraining "
            "text that the optimizer's basis and the pull are read from; `supervises` for data.supervise and "
            "data.supervise_reasoning; `window_size` is batch_size x accumulate_grad_batches x ranks. Restore these "
            "settings, or start a new run from the checkpoint with model.weights"
        )


def check_alike(data: SFTDataModule) -> None:
    """Refuse processes that read different data, which would train some documents twice and others never.

    Raises:
        ValueError: on every process.
    """
    mine = of_training(data) | {f"measured {name}": those for name, those in of_measured(data).items()}
    del mine[FILES]
    everyones: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, mine)
    names = sorted({name for those in everyones for name in those})
    if changed := [name for name in names if any(those.get(name) != mine.get(name) for those in everyones)]:
        raise ValueError(
            f"the processes of this run have different data ({', '.join(changed)}). Give all machines the same files "
            "and settings. What the base writes is alike on devices of one kind only: give data.pretrain_path and "
            "data.heldout_path, and set data.own_chats to 0"
        )


def _told(name: str, plan: dict[str, Any]) -> str:
    """A value of a plan; of a sample, the files as well."""
    files = f" of {', '.join(plan[FILES])}" if name == "sample" and plan.get(FILES) else ""
    return f"{plan[name]}{files}"


def measured_anew(data: SFTDataModule, saved: dict[str, list[Any]]) -> list[str]:
    """The names of what is measured on other documents than the checkpoint's run was, or only in one of the two."""
    now = of_measured(data)
    return [name for name in MEASURED if now.get(name) != saved.get(name)]


def check_measured(data: SFTDataModule, saved: dict[str, list[Any]]) -> None:
    """Refuse to resume where readings would be of other documents than the run's so far.

    Raises:
        ValueError: naming what differs.
    """
    if changed := measured_anew(data, saved):
        raise ValueError(
            f"cannot resume: {' and '.join(MEASURED[name] for name in changed)}: not what the run was measured on so "
            "far, so that its readings could not be compared. Restore these settings, and measure what comes of the "
            "run on other documents with `compare`; or start a new run from the checkpoint with model.weights"
        )
