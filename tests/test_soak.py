"""A long run of a tiny model: memory, open files and processes stay as they were."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minimind_sft.readings import read_metrics

PROJECT = Path(__file__).resolve().parents[1]
STEPS, WARM, GROWTH = 2_000, 400, 24 << 20  # steps, those after which memory must be flat, bytes


def resident(pid: int) -> int:
    """Bytes of memory of a process that are in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def last_step(metrics: Path) -> int:
    lines = metrics.read_text(encoding="utf-8").splitlines()[1:-1] if metrics.is_file() else []  # the last may be half
    return int(lines[-1].split(",")[0]) if lines else -1


SHAPES = """
import ctypes, sys, torch
from minimind_sft.__main__ import main
assert main(["sample", *sys.argv[1:], "--max_mb", "1"]) == 0
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
heap = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = heap
torch.set_num_threads(1)
weight = torch.ones(256, 256, dtype=torch.bfloat16)
for tokens in range(1, 1001):
    torch.mm(torch.ones(tokens, 256, dtype=torch.bfloat16), weight)
    if tokens in (200, 1000):
        print(mallinfo().uordblks)
"""


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported() or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="this CPU does not multiply bf16, or its C library does not tell what is in use",
)
def test_kernels_for_ever_new_numbers_of_tokens_do_not_pile_up(tmp_path: Path) -> None:
    places = [str(PROJECT / "data" / "sft_val.jsonl"), str(tmp_path / "sample.jsonl")]
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    child = subprocess.run(
        [sys.executable, "-c", SHAPES, *places], env=environment, cwd=PROJECT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    warm, end = map(int, child.stdout.split()[-2:])
    assert end - warm < 4 << 20  # 444 MB as torch has it


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory of a process is read from Linux's /proc")
def test_two_thousand_steps_leave_memory_files_and_processes_alone(tmp_path: Path) -> None:
    run, data = tmp_path / "run", PROJECT / "data"
    command = [
        sys.executable, "-m", "minimind_sft", "fit", f"--run_dir={run}", "--device=cpu", "--model.weights=scratch",
        "--model.hidden_size=16", "--model.num_hidden_layers=1", f"--data.train_path={data}/sft_train.jsonl",
        f"--data.val_path={data}/sft_val.jsonl", f"--data.heldout_path={data}/heldout.jsonl", "--data.max_overlap=1",
        f"--data.tokenizer={data}/tokenizer", f"--data.cache_dir={tmp_path}/cache", "--data.batch_size=4",
        "--data.measure_documents=20", "--trainer.max_epochs=99", f"--trainer.max_steps={STEPS}",
        "--log_every_steps=10", "--val_every_steps=50", "--save_every_steps=50",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    memory: dict[int, int] = {}
    files: dict[int, int] = {}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        while process.poll() is None:
            step = last_step(run / "metrics.csv")
            try:
                memory[step], files[step] = resident(process.pid), len(os.listdir(f"/proc/{process.pid}/fd"))
            except (FileNotFoundError, ProcessLookupError):
                break
            time.sleep(0.2)
        process.wait()
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert read_metrics(run / "metrics.csv")[-1]["step"] == STEPS
    warm = [step for step in memory if WARM <= step < STEPS - 50]
    begin, end = (max(memory[step] for step in part) for part in (warm[:5], warm[-5:]))
    print(f"memory {begin / 1e6:.1f} MB around step {warm[2]}, {end / 1e6:.1f} MB around step {warm[-3]}")
    assert end - begin < GROWTH
    assert files[warm[-1]] <= files[warm[0]] + 1
    with pytest.raises(ProcessLookupError):  # nobody is left of its process group
        os.killpg(process.pid, 0)
