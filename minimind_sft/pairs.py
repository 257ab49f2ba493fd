"""Two models made comparable: loaded strictly, with one vocabulary and one tokenizer, on one device.

Token by token comparison means nothing where ids mean different things, so whatever could make them differ is refused
here: vocabularies of two sizes, two tokenizers, a tokenizer with ids that the models lack. Weights are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minimind_sft import hub, self_written, weights
from minimind_sft.chat import ChatTemplate
from minimind_sft.corpus import Store
from minimind_sft.devices import one_device
from minimind_sft.documents import Documents
from minimind_sft.evaluation import bytes_of_tokens, keeps_empty_think
from minimind_sft.files import resolve
from minimind_sft.model import Transformer
from minimind_sft.origins import as_trained, find_origin
from minimind_sft.progress import track
from minimind_sft.sampling import Line
from minimind_sft.scoring import Row, Scores, losses, score
from minimind_sft.self_written import Author

SEEN_IS_REPLAYED = "the seen text may be what TUNED's run replayed, so it tells less than unseen text (--heldout_path)"

# where tokenizers of one vocabulary differ: spaces, digits, capitals, accents, forms of one letter, long words
CUT_OTHERWISE = (
    "The  3 quick foxes' na\u00efve caf\u00e9, cafe\u0301: 12,345.67!\n\n\t\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c"
    "\u516c\u56ed\u3002 \uff21 \ufb01 \U0001f642 internationalization  "
)


class Fed(NamedTuple):
    """How documents are fed to models: settings of `data`, here as `fit` has them by default."""

    max_length: int = 768
    document_format: str = "minimind3"
    too_long: str = "truncate_right"
    supervise: str = "all"
    supervise_reasoning: bool = True
    empty_think_ratio: float = 0.2
    seed: int = 42

    @property
    def of_stores(self) -> dict[str, Any]:
        """Those of them that tokenized data depends on, for `Stores`."""
        names = ("document_format", "supervise", "supervise_reasoning")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Pair:
    """Two models on one device, and how they are fed.

    Attributes:
        about: what the models are, for the record: under `base` and `tuned`, `path`, `sha256` and `description`, and of
            a run's, as `trained_from`, the `sha256` of what it began from.
    """

    base: Transformer
    tuned: Transformer
    template: ChatTemplate
    fed: Fed
    about: dict[str, dict[str, str]]

    @property
    def max_length(self) -> int:
        """Tokens of a document at most."""
        return self.fed.max_length

    @property
    def document_format(self) -> str:
        """How pretraining framed a text."""
        return self.fed.document_format

    @property
    def seed(self) -> int:
        """Of intervals, and of what is drawn."""
        return self.fed.seed

    def chats(self, store: Store) -> Documents:
        """The chats of a store, cut as `fit` would."""
        return Documents(store, max_length=self.max_length, too_long=self.fed.too_long)

    def text(self, store: Store) -> Documents:
        """The documents of a store of text, likewise."""
        return Documents(store, max_length=self.max_length)

    def author(self, cache: Path) -> Author:
        """The base as one that writes."""
        return Author(
            cache=cache,
            model=self.base,
            template=self.template,
            base_sha256=self.about["base"]["sha256"],
            max_length=self.max_length,
            seed=self.seed,
            device=self.base.lm_head.weight.device,
        )

    def own_text(self, cache: Path, documents: int) -> tuple[Store, Iterator[Line]]:
        """Text by the base to measure on, and its lines."""
        store = self.author(cache).texts("measured", documents=documents, document_format=self.document_format)
        return store, self_written.lines(store, self.template, document_format=self.document_format)

    def score_documents(self, documents: Documents, what: str) -> Scores:
        """Score the documents of a store as `fit` would; `what` is said beside the progress bar."""
        rows = self._rows(documents)
        return self.score_rows(rows, rows, what)

    def losses(self, model: Transformer, documents: Documents, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Targets and nats of every document (D,) by one model on the pair's device, on the same tokens."""
        return self.losses_of(model, self._rows(documents), what)

    def losses_of(self, model: Transformer, rows: Sequence[Row], what: str) -> tuple[np.ndarray, np.ndarray]:
        """Targets and nats of every row (D,) by one model."""
        with track(what, total=len(rows)) as progress:
            return losses(model, rows, progress=progress)

    def _rows(self, documents: Documents) -> list[Row]:
        keep = keeps_empty_think(len(documents), self.fed.empty_think_ratio, self.seed)
        return [documents.row(number, bool(kept)) for number, kept in enumerate(keep)]

    def score_rows(self, base_rows: Sequence[Row], tuned_rows: Sequence[Row], what: str) -> Scores:
        """Score rows, see `scoring.score`."""
        with track(what, total=len(base_rows)) as progress:
            return score(
                self.base,
                self.tuned,
                base_rows,
                tuned_rows,
                token_bytes=bytes_of_tokens(self.template),
                progress=progress,
            )


def open_pair(
    base: str,
    tuned: str,
    template: ChatTemplate,
    *,
    left_open: Mapping[str, Any],
    device: str,
    fed: Fed,
) -> Pair:
    """Load both models. What one's tensors leave open (heads, theta, eps) is as `left_open` says, by the names of
    `weights.load`, or else as the other's config does.

    Raises:
        ValueError: a model that cannot be loaded, vocabularies that differ, a base that was trained from its fine-tune,
            a device that is not there.
    """
    where = one_device(device)
    found = [_load(name, path, left_open) for name, path in (("BASE", base), ("TUNED", tuned))]
    sizes = [loaded.config.vocab_size for loaded in found]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"BASE has a vocabulary of {sizes[0]:,} tokens ({found[0].path}) and TUNED of {sizes[1]:,} "
            f"({found[1].path}); they can only be compared token by token with the same one"
        )
    weights.check_vocab(template.vocab_size, found[0].config, key="--tokenizer")
    found = [_settled(found[0], found[1]), _settled(found[1], found[0])]
    about = {
        name: {"path": str(loaded.path), "sha256": loaded.sha256, "description": loaded.describe()}
        | ({"trained_from": sha256} if (sha256 := find_origin(loaded.path).base_sha256) else {})
        for name, loaded in zip(("base", "tuned"), found, strict=True)
    }
    if about["base"].get("trained_from") == about["tuned"]["sha256"]:
        raise ValueError(f"BASE ({base}) was trained from TUNED ({tuned}): give them in the other order")
    models = [weights.build(loaded).to(where) for loaded in found]
    return Pair(models[0], models[1], template, fed, about)


def _settled(loaded: weights.Loaded, other: weights.Loaded) -> weights.Loaded:
    """With the config of the other of the pair, where its own was read off its tensors and the other's was not."""
    shapes, others = (
        {name: tensor.shape for name, tensor in one.state_dict.items() if name.startswith("model.layers.")}
        for one in (loaded, other)
    )
    if not loaded.defaults or other.defaults or shapes != others:
        return loaded
    own = {name: getattr(loaded.config, name) for name in ("vocab_size", "tie_word_embeddings")}
    return replace(loaded, config=replace(other.config, **own), defaults=())


def fed_as(base: str, tuned: str, **given: Any) -> Fed:
    """As given, where that is not None, else as a run around TUNED or BASE has it, else the defaults of `fit`."""
    origins = [find_origin(resolve(path)) for path in (tuned, base)]
    fed = Fed(*(as_trained(origins, name, default) for name, default in Fed._field_defaults.items()))
    return fed._replace(**{name: value for name, value in given.items() if value is not None})


def find_tokenizer(base: str, tuned: str, given: str | None) -> Path:
    """The folder of the tokenizer: as given, or what `Origin.known_tokenizer` finds of TUNED, then of BASE.

    Raises:
        ValueError: no such model, no tokenizer there, or two that give text different ids.
    """
    if given is not None:
        return hub.local(resolve(given))
    for name, path in (("BASE", base), ("TUNED", tuned)):
        _check_there(name, path)
    origins = [find_origin(resolve(path)) for path in (tuned, base)]
    folders = [found for origin in origins if (found := origin.known_tokenizer()) is not None]
    if not folders:
        raise ValueError(f"no tokenizer.json in or beside {tuned} or {base}; give --tokenizer FOLDER")
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in folders]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    ids = [tokenizer.encode(CUT_OTHERWISE, add_special_tokens=False).ids for tokenizer in tokenizers]
    if vocabularies[0] != vocabularies[-1] or ids[0] != ids[-1]:
        differ = "have different vocabularies" if vocabularies[0] != vocabularies[-1] else "cut text differently"
        raise ValueError(
            f"the tokenizers in {folders[0]} and {folders[-1]} {differ}; models can only be "
            "compared token by token with the same one. Where both models mean the same ids, give --tokenizer FOLDER"
        )
    return folders[0]


def _check_there(name: str, path: str) -> None:
    if not hub.local(resolve(path)).exists():
        raise ValueError(f"{name} {path} does not exist; it is a .pth, .safetensors or .ckpt file, or a folder")


def _load(name: str, path: str, left_open: Mapping[str, Any]) -> weights.Loaded:
    _check_there(name, path)
    try:
        return weights.load(resolve(path), **left_open)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
