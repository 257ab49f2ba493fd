"""Intervals that hold what they promise, and McNemar's test."""

import numpy as np
import pytest

from minimind_sft.significance import Interval, Resampling, mcnemar, student


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (9, 1, 0.021484375), (10, 2, 0.03857421875)],
)
def test_mcnemars_exact_test(lost: int, gained: int, p_value: float) -> None:
    assert mcnemar(lost, gained) == p_value


def test_mcnemars_test_of_many_facts_does_not_overflow() -> None:
    assert mcnemar(3_000, 1_000) < 1e-200


def _books(seed: int) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """6 sources of 3 books of 5 pages; the pages of a book rise and fall together. The true mean is 0.1."""
    random = np.random.default_rng(seed)
    of_book, of_page = random.normal(0, 0.3, 18), random.normal(0, 0.1, 90)
    tokens = random.integers(80, 120, 90)
    rise = (0.1 + np.repeat(of_book, 5) + of_page) * tokens
    books = [str(page // 5) for page in range(90)]
    return rise, tokens, books, [str(page // 15) for page in range(90)]


def test_the_interval_holds_the_truth_as_often_as_it_says_because_it_draws_whole_parents() -> None:
    inside = {"books": 0, "pages": 0}
    for seed in range(200):
        rise, tokens, books, sources = _books(seed)
        for name, parents in (("books", books), ("pages", [str(page) for page in range(90)])):
            interval = Resampling(parents, sources, seed=seed, resamples=400).ratio(rise, tokens)
            assert interval is not None
            inside[name] += interval.low <= 0.1 <= interval.high
    assert 184 <= inside["books"] <= 197  # plain draws of 3 out of 3 books: below 184, even if stretched
    assert inside["pages"] < 130  # as if pages were independent


@pytest.mark.parametrize(
    ("freedom", "reach"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)]
)
def test_students_t(freedom: int, reach: float) -> None:
    assert student(freedom) == pytest.approx(reach, rel=0.008)


def test_two_parents_say_little() -> None:
    interval = Resampling(["a", "b"], ["s", "s"], seed=1).ratio(np.array([0.0, 10.0]), np.array([10, 10]))
    assert interval == pytest.approx((0.5 - 0.5 * 6.483, 0.5 + 0.5 * 6.483), rel=1e-3)


def test_models_that_do_not_differ_have_an_interval_of_zero_width() -> None:
    draws = Resampling(["a", "b", "c"], ["s", "s", "t"], seed=1)
    assert draws.ratio(np.zeros(3), np.array([5, 6, 7])) == Interval(0.0, 0.0)


def test_differences_between_sources_do_not_widen_the_interval() -> None:
    rise, tokens = np.array([1.0, 1.0, 9.0, 9.0]), np.ones(4)
    parents = ["a", "b", "c", "d"]
    assert Resampling(parents, ["s", "s", "t", "t"], seed=1).ratio(rise, tokens) == Interval(5.0, 5.0)
    pooled = Resampling(parents, ["s", "s", "s", "s"], seed=1).ratio(rise, tokens)
    assert pooled is not None and pooled.low < 3 and pooled.high > 7


def test_sources_with_one_parent_are_drawn_together() -> None:
    draws = Resampling(["a", "b", "c", "d", "e"], ["s", "s", "t", "u", "v"], seed=1)
    assert [members.tolist() for members in draws.strata] == [[0, 1], [2, 3, 4]]
    lonely = Resampling(["a", "b", "c"], ["s", "s", "t"], seed=1)
    assert [members.tolist() for members in lonely.strata] == [[0, 1, 2]]


def test_one_parent_says_nothing_about_others() -> None:
    assert Resampling(["a", "a"], ["s", "s"], seed=1).ratio(np.ones(2), np.ones(2)) is None


def test_parents_of_one_name_in_two_sources_are_two() -> None:
    assert Resampling(["1", "1", "2"], ["s", "t", "t"], seed=1).clusters == 3


def test_the_seed_decides_the_draws() -> None:
    rise, tokens, books, sources = _books(0)
    first, same, other = (Resampling(books, sources, seed=seed).ratio(rise, tokens) for seed in (1, 1, 2))
    assert first == same != other
