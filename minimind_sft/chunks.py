"""How many rows of logits are made at once: `memory.py` plans with it (so no torch), `losses.py` trains with it,
`scoring.py` judges with it.

On a CPU a chunk should stay in its cache: with 6,400 logits a row, 327 rows are 1.3 to 2 times as fast as all of 6,000.
On a GPU a chunk should be large enough to keep it busy. However large the vocabulary, a chunk reads the whole output
layer, which a few rows would not pay for.
"""

LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 25}  # 8 and 128 MiB in fp32; elsewhere as on a GPU
MIN_ROWS = 256


def rows_at_once(vocab_size: int, device: str) -> int:
    """Rows whose logits are made together on a type of device."""
    return max(MIN_ROWS, LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cuda"]) // vocab_size)
