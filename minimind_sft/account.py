"""Where every line of the sample went, in words: what `fit` and `inspect` both say of it. No torch.

The sums add up: lines chosen = trained + validated on + rejected, and each line stands under one reason only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minimind_sft.caps import described
from minimind_sft.corpus import Store
from minimind_sft.dealing import Dealt
from minimind_sft.documents import Documents
from minimind_sft.report import rejected
from minimind_sft.selection import MEBIBYTE


def chosen(dealt: Dealt) -> str:
    """`12 of 40 lines, 0.02 MB (max_mb 72, seed 42; all lines are within)`, and what each source of a mixture gave."""
    note = _store_note(dealt)
    lines = note["lines_seen"] - note["blank"]
    told = f"{note['selected']:,} of {lines:,} lines, {note['bytes'] / MEBIBYTE:,.2f} MB ({described(note)})"
    return told + "".join(
        f"; {source['selected']:,} lines, {source['bytes'] / max(note['bytes'], 1):.1%} of {source['name']}"
        for source in note.get("sources", ())
    )


def used(dealt: Dealt) -> str:
    """`10 trained, 2 validated on, 3 rejected: 2 duplicate, 1 not_json`."""
    assert dealt.train is not None
    split = f"{dealt.split_off:,} validated on, " if dealt.split_off else ""
    lost = f"{sum(dealt.rejected.values()):,} rejected: {rejected(dealt.rejected)}"
    return f"{len(dealt.train):,} trained, {split}{lost}"


def too_long(documents: Documents) -> str:
    """`truncate_right at 768 tokens: 3 of 10 chats cut, 1 lost (40.0 %), and with them 12.5 % of the supervised
    tokens`."""
    cut, lost, total = documents.cut, documents.lost, len(documents) + documents.lost
    if not cut + lost:
        return f"none above {documents.max_length:,} tokens"
    return (
        f"{documents.too_long} at {documents.max_length:,} tokens: {cut:,} of {total:,} cut, {lost:,} lost "
        f"({(cut + lost) / total:.1%}), and with them {documents.targets_lost:.1%} of the supervised tokens"
    )


def dropped(store: Store) -> str:
    """`40 without their tools, 12 without their assistant reasoning_content: the chat template has no place for
    them`; empty where it has for all."""
    lost = [f"{count:,} without their {what}" for what, count in store.dropped.items()]
    return f"{', '.join(lost)}: the chat template has no place for them" if lost else ""


def sums(dealt: Dealt) -> dict[str, Any]:
    """The same for `sample.json`: what was noted when the sample was made, and where its lines went."""
    assert dealt.train is not None
    return _store_note(dealt) | {
        "tokens": int(np.minimum(np.diff(dealt.train.store.offsets), dealt.train.max_length).sum()),
        "rejected": dealt.rejected,
        "dropped_by_template": dealt.train.store.dropped,
        "documents": len(dealt.train.store),
        "trained": len(dealt.train),
        "validated": dealt.split_off,
        "too_long": dealt.train.too_long,
        "cut": dealt.train.cut,
        "supervised_tokens_lost": round(dealt.train.targets_lost, 6),
    }


def _store_note(dealt: Dealt) -> dict[str, Any]:
    assert dealt.train is not None
    note: dict[str, Any] = dealt.train.store.meta["note"]
    return note
