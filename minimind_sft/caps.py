"""How much is trained on: four caps on the sample, of which the tightest wins and is named.

    max_mb       MB (of 1024 * 1024 bytes) of lines
    max_ratio    the same as a share of the pretraining text's bytes
    max_rows     lines
    max_tokens   tokens of the lines as rendered, each document counted up to `max_length`

Every one of them cuts the same shuffled order off at some place, for good, at the first line that would pass it. So
with one seed a smaller cap's sample is the beginning of a larger one's. What is rejected later, as a duplicate say, has
been counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from minimind_sft.corpus import Taken
from minimind_sft.sampling import Selection
from minimind_sft.selection import MEBIBYTE

RULE_OF_THUMB = (1_000, 10_000)  # SFT : pretraining, 1 : N


class Caps(NamedTuple):
    """The caps of a run, None where there is none; `pretrain_bytes` is what `max_ratio` is a share of."""

    max_mb: float | None
    max_ratio: float | None
    max_rows: int | None
    max_tokens: int | None
    pretrain_bytes: int | None

    def check(self) -> None:
        """Raises ValueError for a cap that no line could keep, or a ratio of an unknown size."""
        for name in ("max_rows", "max_tokens"):
            if (cap := getattr(self, name)) is not None and cap < 1:
                raise ValueError(f"data.{name} is {cap}; give a number of at least 1, or null for no cap")
        if self.max_mb is not None and not self.max_mb >= 0:
            raise ValueError(f"data.max_mb is {self.max_mb}; give a number of MB, 0 or above, or null for no cap")
        if self.max_ratio is not None and not self.max_ratio > 0:
            raise ValueError(f"data.max_ratio is {self.max_ratio}; give a ratio above 0, or null for no cap")
        if self.max_ratio is not None and self.pretrain_bytes is None:
            raise ValueError(
                "data.max_ratio needs the size of the pretraining text: set data.pretrain_path or data.pretrain_mb"
            )

    @property
    def given(self) -> dict[str, float]:
        """Those that are set, by name."""
        return {name: value for name, value in self._asdict().items()
                if value is not None and name != "pretrain_bytes"}

    @property
    def size(self) -> tuple[str, float | None]:
        """The tighter of `max_mb` and `max_ratio`, by name, and what it comes to in MB."""
        if self.max_ratio is None or self.pretrain_bytes is None:
            return "max_mb", self.max_mb
        by_ratio = self.max_ratio * self.pretrain_bytes / MEBIBYTE
        by_size = self.max_mb is not None and self.max_mb <= by_ratio
        return ("max_mb", self.max_mb) if by_size else ("max_ratio", by_ratio)

    def require_some(self, selection: Selection) -> None:
        """Raises ValueError, with cause and remedy, where a selection by these caps is empty."""
        if selection.why_empty is not None and self.size[0] == "max_ratio" and selection.stopped_by == "max_mb":
            raise ValueError(
                f"nothing is selected: data.max_ratio {self.max_ratio:g} of {self.pretrain_bytes:,} bytes of "
                f"pretraining text is less than the first line, with seed {selection.seed}. Raise it, or set it to null"
            )
        selection.require_some()

    def note(self, selection: Selection, taken: Taken) -> dict[str, Any]:
        """The manifest of what was taken of a selection, so that `sample --manifest` can rebuild it, with `caps`,
        `tokens` and `tightest`, the name of the cap that ended it (`end` for none).

        Raises:
            ValueError: `max_tokens` leaves nothing.
        """
        if taken.stopped and not taken.lines:
            raise ValueError(f"data.max_tokens is {self.max_tokens}; the first document has more: raise it")
        tightest = self.size[0] if selection.stopped_by == "max_mb" else selection.stopped_by
        tightest = "max_tokens" if taken.stopped else tightest
        manifest = selection.manifest(taken.lines if taken.stopped else None)
        return manifest | {"caps": self.given, "tokens": taken.tokens, "tightest": tightest}


def described(note: dict[str, Any]) -> str:
    """What capped a sample, from what `Caps.note` noted: `max_mb 72, max_rows 1,000 (the tightest), seed 42`."""
    mixed = "sources" in note
    if not note["caps"]:
        return f"no cap over all, seed {note['seed']}" if mixed else "no cap"
    marked = [f"{name} {cap:,g}" + " (the tightest)" * (name == note["tightest"] and len(note["caps"]) > 1)
              for name, cap in note["caps"].items()]
    within = "all that the sources give is within" if mixed else "all lines are within"
    return f"{', '.join(marked)}, seed {note['seed']}" + f"; {within}" * (note["tightest"] == "end")
