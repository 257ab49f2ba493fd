"""Where a run starts: the weights of a base, or a seeded random initialisation, made to fit the tokenizer.

It lives outside the module's children, so that the base's output layer is neither trained nor saved where the model
has a new one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minimind_sft import weights as weight_files
from minimind_sft.files import resolve
from minimind_sft.model import Transformer
from minimind_sft.model_config import from_sizes


class Start:
    """What the settings say of the weights, and what comes of them.

    Args:
        family: minimind3 or minimind2; None to tell it from the weights.
        shape: `hidden_size` and such: made so from scratch, else only checked; None for what is not asked.
        constants: what a `.pth` leaves open, `rope_theta` and such; None for the family's.
        num_experts_per_tok: likewise, of an MoE model.
        reset_head: give the model a new, untied output layer.
        resize_vocab: give it rows for tokens that it does not have.
        seed: of whatever is initialised at random.

    Attributes:
        sha256: of the base's weights; None: there is no base.
        description: of the weights, in one line.
        head: the base's output layer (V, C) where `reset_head` gave the model another; else None.
    """

    def __init__(
        self,
        *,
        family: str | None,
        shape: dict[str, int | None],
        constants: dict[str, Any],
        num_experts_per_tok: int | None,
        reset_head: bool,
        resize_vocab: bool,
        seed: int,
    ) -> None:
        self._family, self._shape, self._constants = family, shape, constants
        self._num_experts_per_tok = num_experts_per_tok
        self.reset_head, self.resize_vocab, self.seed = reset_head, resize_vocab, seed
        self.sha256: str | None = None
        self.description = "random weights"
        self.head: Tensor | None = None

    def load(self, source: str) -> Transformer:
        """The base.

        Raises:
            ValueError: weights that cannot be loaded strictly, or settings that contradict them.
        """
        model, loaded = weight_files.load_model(
            resolve(source),
            family=self._family,
            num_attention_heads=self._shape["num_attention_heads"],
            num_key_value_heads=self._shape["num_key_value_heads"],
            num_experts_per_tok=self._num_experts_per_tok,
            **self._constants,
        )
        for name, wanted in self._shape.items():
            found = getattr(loaded.config, name)
            if wanted is not None and wanted != found:
                raise ValueError(f"model.{name} is {wanted}, but {loaded.path} has {found}; leave model.{name} out")
        if self._num_experts_per_tok is not None and not loaded.config.num_experts:
            raise ValueError(
                f"model.num_experts_per_tok is {self._num_experts_per_tok}, but {loaded.path} has no experts; leave it "
                "out"
            )
        self.sha256, self.description = loaded.sha256, loaded.describe()
        if self.reset_head:
            self.head = model.lm_head.weight
            model.reset_head(self.seed)
        return model

    def scratch(self, vocab_size: int) -> Transformer:
        """Random weights; `vocab_size` where the settings do not say."""
        shape = self._shape | {"vocab_size": self._shape["vocab_size"] or vocab_size}
        model = Transformer(from_sizes(self._family, shape, **self._constants))
        model.initialise(self.seed)
        if self.reset_head:
            model.reset_head(self.seed + 1)  # with the same one, it would be the embedding's copy
        return model

    def fit_vocab(self, model: Transformer, wanted: int) -> None:
        """Make room for all of the tokenizer's tokens, if asked to, and say so in `description`.

        Raises:
            ValueError: a model that has no row for some token.
        """
        old = model.config.vocab_size
        if self.resize_vocab and wanted > old:
            model.resize_vocab(wanted)
            tables = "embedding" if model.config.tie_word_embeddings else "embedding and output layer"
            self.description += (
                f"; vocabulary {old} -> {wanted} (model.resize_vocab): "
                f"each of the {wanted - old} new rows of the {tables} is the mean of the old"
            )
        weight_files.check_vocab(wanted, model.config, **weight_files.OF_FIT)
