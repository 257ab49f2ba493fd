"""What a step of `sft.yaml` takes beside one that holds on to nothing (`original.yaml`) and learns from as many chats.

    python tests/benchmarks/bench_steps.py [--steps 40] [--threads 1] [--cpu 0] [any options of `fit`]

Both train in processes of their own on the same chats and take turns, step by step, on the same core: whatever else
slows the machine down meets both, so that the ratio, taken pair by pair, is known better than either time. A step is
all of it, from fetching its chats to the optimizer. On a GPU both processes need room, and each turn waits for it.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WARM = 3  # pairs left out
HELD = ["--config=sft.yaml"]
PLAIN = [*HELD, "--config=original.yaml"]


def train(arguments: list[str], turn: Connection) -> None:
    """Take steps; each waits for a message, and is answered with its wall and processor seconds."""
    import torch  # noqa: PLC0415 - in this process, behind its number of threads

    from minimind_sft.__main__ import main  # noqa: PLC0415
    from minimind_sft.module import SFTModule  # noqa: PLC0415

    begun: list[float] = []

    def passed(module: SFTModule, batch: Any, batch_idx: int) -> None:
        """Where a step begins, the one before has ended."""
        if batch_idx % module.trainer.accumulate_grad_batches:
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        if begun:
            turn.send([now - then for now, then in zip((time.perf_counter(), time.process_time()), begun, strict=True)])
        turn.recv()
        begun[:] = time.perf_counter(), time.process_time()

    SFTModule.on_train_batch_start = passed  # type: ignore[method-assign,assignment]
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(main(["fit", *arguments]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", type=int, help="the core that both share; else the system chooses")
    options, more = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    steps = WARM + options.steps + 1
    quick = ["--export=none", "--val_every_steps=1000000", "--save_every_steps=1000000", "--data.measure_documents=4"]
    spawn, turns, processes = multiprocessing.get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in (("held", HELD), ("plain", PLAIN)):
            ours, theirs = spawn.Pipe()
            last = [f"--run_dir={Path(folder) / name}", f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
            arguments = [*config, "--trainer.accumulate_grad_batches=2", *quick, *more, *last]
            processes.append(spawn.Process(target=train, args=(arguments, theirs), daemon=True))
            turns.append(ours)
            processes[-1].start()
            theirs.close()
        pairs = []
        for _ in range(steps - 1):
            pair = []
            for turn in turns:
                turn.send(None)
                pair.append(turn.recv())
            pairs.append(pair)
        for process in processes:
            process.kill()
    print(f"{len(pairs) - WARM} pairs of steps, medians and quartiles")
    for kind, what in enumerate(("by the clock", "by processor time")):
        held, plain = zip(*[[one[kind] for one in pair] for pair in pairs[WARM:]], strict=True)
        low, middle, high = statistics.quantiles([one / other for one, other in zip(held, plain, strict=True)], n=4)
        print(
            f"{what:18} held {statistics.median(held):.3f} s, plain {statistics.median(plain):.3f} s,"
            f" ratio {middle:.3f} ({low:.3f} to {high:.3f}), of sums {sum(held) / sum(plain):.3f}"
        )


if __name__ == "__main__":
    main()
