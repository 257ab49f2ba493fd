"""Text that held-out documents share with chats, and with what is replayed."""

import numpy as np
import pytest

from minimind_sft.overlap import WIDTH, likeness, shares, shingles

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def text(seed: int, length: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list(ALPHABET), length))


def test_equal_runs_of_fifty_characters_have_equal_hashes_wherever_they_stand() -> None:
    run = text(0, WIDTH)
    there = shingles(text(1, 30) + run + text(2, 30))
    assert shingles(run)[0] == there[30]
    assert len(there) == 61 and len(set(there.tolist())) == 61


def test_one_changed_character_changes_every_run_that_holds_it() -> None:
    long = text(3, 200)
    changed = long[:100] + "#" + long[101:]
    same = shingles(long) == shingles(changed)
    assert same.tolist() == [not 51 <= start <= 100 for start in range(151)]


def test_the_share_is_of_the_held_out_documents_shingles() -> None:
    document = text(4, 149)  # 100 shingles
    assert shares([document], ["x" + document[:74] + "y"]) == [pytest.approx(0.25)]
    assert shares([document, text(5, 100)], [document]) == [1.0, 0.0]


def test_white_space_does_not_hide_a_copy_and_short_documents_share_nothing() -> None:
    document = text(6, 120)
    spaced = " ".join(document[start : start + 7] for start in range(0, 120, 7))
    assert shares([document], [spaced]) == [1.0]
    assert shares(["short"], ["short"]) == [0.0]


def test_a_copy_is_found_though_something_was_added_or_only_a_part_was_copied() -> None:
    measured = [text(7, 149), text(8, 149)]  # 100 shingles each
    added = text(9, 2000) + measured[1] + text(10, 2000)
    part = measured[0][:74] + text(11, 75)  # 25 of its 100 shingles
    assert likeness([added, part, text(12, 500), "short"], measured) == [1.0, pytest.approx(0.25), 0.0, 0.0]
    assert likeness(["anything"], []) == [0.0]
