"""The permutation of ``random.Random(seed).shuffle(list)``, exactly, on 4 bytes an element. No torch.

Python's shuffle walks i from the last index down to 1, draws j in [0, i] and swaps elements i and j. A draw takes the
top bits of one 32-bit word of the Mersenne Twister, as many as i + 1 has, and is repeated while it exceeds i. Both
halves go in blocks: words come from `randbytes`, which is the same stream, and swaps whose indices are all different
commute, so that numpy does them at once. Blocks in which two indices meet (a sixth of them at the size chosen) are
swapped one by one.

Two million elements take 0.15 s instead of 0.98, and 8 MB instead of 72.
"""

import random

import numpy as np
from numpy.typing import NDArray

WORDS = 4096  # random words fetched at a time
MOST = (1 << 32) - 1  # elements: beyond, a draw takes two words


def shuffled_indices(count: int, seed: int) -> NDArray[np.uint32]:
    """What ``random.Random(seed).shuffle`` makes of ``list(range(count))``, shape (count,).

    Raises:
        ValueError: for more than 2**32 - 1 elements.
    """
    if count > MOST:
        raise ValueError(f"{count:,} lines are more than can be shuffled at once ({MOST:,}): split the input")
    order = np.arange(count, dtype=np.uint32)
    rng = random.Random(seed)
    words = np.empty(0, dtype=np.uint32)
    last = count - 1
    while last > 0:
        if not words.size:
            words = np.frombuffer(rng.randbytes(4 * WORDS), dtype="<u4")
        draws, used = _draw(words, last)
        _swap(order, last, draws)
        words = words[used:]
        last -= draws.size
    return order


def _draw(words: NDArray[np.uint32], last: int) -> tuple[NDArray[np.int64], int]:
    """The accepted draws for i = last, last - 1, ..., as far as words and bits go; and how many words they took."""
    bits = (last + 1).bit_length()
    steps = last + 2 - max(1 << (bits - 1), 2)  # values of i for which i + 1 has that many bits
    draws = (words >> np.uint32(32 - bits)).astype(np.int64)
    # A draw is accepted where it is at most i, and i depends on how many were accepted before: start from an upper
    # bound. Each round settles at least one more, and in practice two or three rounds settle all.
    accepted = draws <= last
    while True:
        revised = draws <= last - (np.cumsum(accepted) - accepted)
        if np.array_equal(revised, accepted):
            break
        accepted = revised
    taken = np.flatnonzero(accepted)[:steps]
    return draws[taken], int(taken[-1]) + 1 if taken.size == steps else words.size


def _swap(order: NDArray[np.uint32], last: int, draws: NDArray[np.int64]) -> None:
    """Swap order[i] and order[draw] for i = last, last - 1, ... in place."""
    done = 0
    while done < draws.size:
        high = last - done
        # Two of b draws meet with a chance of b*b / high: this b balances a block's fixed cost against the slow path.
        block = draws[done : done + max(16, int((20 * high) ** (1 / 3)))]
        low = high - block.size + 1
        in_order = np.sort(block)
        if block.size > 16 and in_order[-1] < low and (in_order[1:] != in_order[:-1]).all():
            upper = order[low : high + 1][::-1]
            moved = order[block]
            order[block] = upper
            upper[:] = moved
        else:
            cells = memoryview(order)  # type: ignore[arg-type]
            for i, j in zip(range(high, low - 1, -1), block.tolist(), strict=True):
                cells[i], cells[j] = cells[j], cells[i]
        done += block.size
