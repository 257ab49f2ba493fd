"""A Parquet file to JSON lines: each row becomes the object of its columns, in batches. No torch.

Needs pyarrow, an extra. A column's name is a key, a list column a list, a struct an object. In Parquet a value that is
null and a key that is absent are the same, so what is null is left out, at every depth. Dates are written as ISO 8601,
bytes as text. A few hundred rows are in memory at a time, and what pyarrow holds of a row group.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, time
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"PAR1"  # the file begins and ends with it
ROWS = 256  # at a time


def parquet_blocks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The rows of a Parquet file as JSON lines, in blocks.

    Args:
        path: of the file.
        raw: the file, opened; its position is moved along with the rows, for whoever shows progress.

    Raises:
        ValueError: pyarrow is missing, the file is damaged, two columns have one name, or pyarrow cannot read a value.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is a Parquet file: `pip install pyarrow` (the extra parquet) to read it") from None
    size, done = path.stat().st_size, 0
    with _named(path):
        file = ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # or it reads row groups whole
    with file:
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path}: two columns are called {twice[0]!r}; rename one of them")
        batches = file.iter_batches(batch_size=ROWS)
        while True:
            with _named(path):
                if (batch := next(batches, None)) is None:
                    return
                rows = batch.to_pylist()
            yield "".join(map(_line, rows)).encode()
            done += len(rows)
            raw.seek(size * done // file.metadata.num_rows)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What pyarrow says of a file, with its name."""
    try:
        yield
    except (ValueError, OSError) as error:  # its own errors are one or the other
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as Parquet ({what}): if it is damaged, make it again") from error


def estimated_bytes(path: Path) -> int:
    """Bytes of the values, uncompressed, by the file's own table of contents; 0 where it cannot be read."""
    try:
        from pyarrow.parquet import read_metadata

        found = read_metadata(path)
        return sum(found.row_group(number).total_byte_size for number in range(found.num_row_groups))
    except (ImportError, ValueError, OSError):
        return 0


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_present(row), ensure_ascii=False, default=_plain) + "\n"


def _present(value: Any) -> Any:
    """A value without what is null, or no number, in its objects."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if not _is_none(inner)}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _is_none(value: Any) -> bool:
    return value is None or isinstance(value, float) and not math.isfinite(value)


def _plain(value: Any) -> str:
    """What JSON has no form for."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.isoformat() if isinstance(value, (date, time)) else str(value)
