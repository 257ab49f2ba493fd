"""How long `sample` takes, and how much memory, against the original's way of doing it. The outputs are compared.

    python tests/benchmarks/bench_sampling.py [--gb 0.2] [--max_mb 72] [--repeat 3] [--no-baseline]

Writes a JSONL file of that size (chats of some 700 bytes, half Chinese, an emoji now and then) to a temporary
folder, reads it once so that it is in the page cache, then runs both in processes of their own, in turn; the best
repetition counts. Target: at 1.6 GB (2 million lines) at least 5 times as fast as the original, peak memory under
64 MB + 24 bytes a line, and ten times the file in ten times the time. `--gb 1.6` takes half a minute a repetition,
and 2 GB of disk and memory.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BASELINE = """
import random, sys
source, target, max_mb = sys.argv[1], sys.argv[2], float(sys.argv[4])
random.seed(42)
with open(source, encoding="utf-8") as file:
    lines = file.readlines()
random.shuffle(lines)
total, taken = 0, []
for line in lines:
    line = line.strip()
    if not line:
        continue
    size = len(line.encode("utf-8"))
    if total + size > max_mb * 1024 * 1024:
        break
    taken.append(line)
    total += size
with open(target, "w", encoding="utf-8") as file:
    for line in taken:
        file.write(line + "\\n")
"""
OURS = "import sys; from minimind_sft.sampling import main; assert main(sys.argv[1:]) == 0"
PEAK = '\nprint(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])'


def generate(path: Path, size: int) -> int:
    """Write about ``size`` bytes of chats; returns the number of lines."""
    rng = random.Random(0)
    words = "the a of model learns token 模型 学习 语言 你好 世界 数据 训练 遗忘".split() * 20 + ["🙂"]  # noqa: SIM905
    pool = []
    for _ in range(5000):
        turns = [" ".join(rng.choices(words, k=rng.randint(5, 100))) for _ in range(2)]
        roles = zip(("user", "assistant"), turns, strict=True)
        row = {"conversations": [{"role": role, "content": text} for role, text in roles]}
        pool.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    lines = written = 0
    with path.open("wb") as file:
        while written < size:
            block = b"".join(rng.choices(pool, k=2000))
            lines, written = lines + 2000, written + file.write(block)
    return lines


def run(code: str, source: Path, target: Path, max_mb: float) -> tuple[float, float, float]:
    """Wall seconds and processor seconds of a whole process, and its peak memory in MB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code + PEAK, str(source), str(target), "--max_mb", str(max_mb)]
    begin, before = time.perf_counter(), os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - begin, os.times()
    busy = sum(after[2:4]) - sum(before[2:4])
    return wall, busy, int(done.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.2)
    parser.add_argument("--max_mb", type=float, default=72)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, ours, original = (Path(folder) / name for name in ("in.jsonl", "ours.jsonl", "original.jsonl"))
        lines = generate(source, int(options.gb * 1e9))
        with source.open("rb") as file:
            while file.read(1 << 24):
                pass
        print(f"{source.stat().st_size / 1e9:.2f} GB, {lines:,} lines, cap {options.max_mb:g} MB")
        results: dict[str, list[tuple[float, float, float]]] = {"ours": [], "original": []}
        for _ in range(options.repeat):
            results["ours"].append(run(OURS, source, ours, options.max_mb))
            if options.baseline:
                results["original"].append(run(BASELINE, source, original, options.max_mb))
                assert ours.read_bytes() == original.read_bytes(), "the samples differ"
        allowed = 64 + 24 * lines / 2**20
        best = {name: [min(column) for column in zip(*runs, strict=True)] for name, runs in results.items() if runs}
        for name, (wall, busy, peak) in best.items():
            print(f"{name:9} {wall:6.2f} s  {busy:6.2f} processor s  {peak:6.0f} MB at most")
        print(f"allowed {allowed:.0f} MB at most")
        if options.baseline:
            wall, busy = (best["original"][column] / best["ours"][column] for column in (0, 1))
            print(f"the same bytes, {wall:.1f} times as fast by the clock, {busy:.1f} times by processor time")


if __name__ == "__main__":
    main()
