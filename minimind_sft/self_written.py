"""Text that the base writes itself, to be replayed where its pretraining text is not at hand.

Every document is drawn from the base at temperature 1 behind what opens a document, so its tokens follow the base's own
distribution; on them KL(base || model) asks the model to stay what it was wherever the base goes by itself
(self-generated replay: arXiv 2403.01244, arXiv 2509.04259). Written once, in batches, until there is enough for an
epoch, and kept in the cache under the base, the tokenizer and the seed. On one core, a base of 5 M parameters writes
1,400 tokens a second.
"""

from __future__ import annotations

from pathlib import Path

from minimind_sft import corpus
from minimind_sft.chat import DOCUMENT_FRAMES, ChatTemplate, Span
from minimind_sft.corpus import Store
from minimind_sft.generate import generate
from minimind_sft.model import Transformer
from minimind_sft.progress import track

TOGETHER = 64  # documents written at once


def self_written(
    cache: Path,
    model: Transformer,
    template: ChatTemplate,
    *,
    base_sha256: str,
    tokens: int,
    most_documents: int,
    max_length: int,
    document_format: str,
    seed: int,
) -> Store:
    """A store of documents by the base, from the cache or written now.

    Args:
        cache: folder of all stores.
        model: the base, on the device that shall write.
        template: its tokenizer.
        base_sha256: of its file.
        tokens: write until there are as many.
        most_documents: or as many documents.
        max_length: tokens of a document at most.
        document_format: how pretraining framed a text.
        seed: of what is drawn.

    Raises:
        ValueError: a tokenizer without a token that opens a document.
    """
    first, last = (template.token_id(token) for token in DOCUMENT_FRAMES[document_format])
    opens = next((token for token in (first, template.bos_id, template.eos_id) if token is not None), None)
    if opens is None:
        raise ValueError(
            f"data.replay_source self: the tokenizer has no token that opens a document of data.document_format "
            f"{document_format}, so the base cannot begin one; give its pretraining text as data.pretrain_path"
        )
    stops = {token for token in (last, *template.stop_ids) if token is not None}
    key = {
        "kind": "self_written",
        "base": base_sha256,
        "tokenizer": template.fingerprint,
        "format": document_format,
        "tokens": tokens,
        "documents": most_documents,
        "max_length": max_length,
        "seed": seed,
    }

    def make(folder: Path) -> None:
        documents: list[list[Span]] = []
        written = 0
        with track("the base writes text to replay", total=tokens) as progress:
            while written < tokens and len(documents) < most_documents:
                batch = generate(
                    model,
                    [[opens]] * min(TOGETHER, most_documents - len(documents)),
                    max_new_tokens=max_length - 1,
                    temperature=1.0,
                    seed=seed + len(documents),
                    stop_ids=stops,
                )
                documents += [[Span([opens], False), Span(ids, True)] for ids in batch]
                written += sum(1 + len(ids) for ids in batch)
                progress(min(written, tokens))
        corpus.build_from_spans(folder, documents, template.vocab_size, source="the base")

    return corpus.open_or_build(cache, key, make)
