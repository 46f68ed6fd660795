"""What a record of the run log costs: `python benchmarks/logging_cost.py [--records=1000000]`.

Writes records through the real logger (console to /dev/null) and prints the cost of the last thousand before 10^3, 10^4, 10^5
and 10^6: it is the same, however long the run. `mixed` has an evaluation and two checkpoints every 250 records, as a real run
has; sections that overflow and are written anew, and the fsync of each checkpoint, are in its figures.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time

from command_line import parser_of

from configurator import Config, OptimConfig, RunConfig
from run_file import StepRecord, Throughput, log_path
from training_logger import TrainingLogger


def log_one(log: TrainingLogger, step: int, mixed: bool) -> None:
    loss = 3.2145123 + 1 / (step + 1)
    moments = (-5.67e-6, 2.34e-4) if step % 10 == 0 else (None, None)
    log.step(StepRecord(step, loss, 1.5e-4, 234.1234, 0.0213, step * 491_520, 1.2345678, *moments, 2.34, 3.12, 4.0))
    if mixed and step % 250 == 0:
        log.evaluation(step, loss, loss + 0.01, 0.98, 1.5e-4, step * 491_520)
        for tier, save_s in (("latest", 2.1), ("best_model", 0.1)):
            path = f"out/checkpoints/{tier}"
            log.checkpoint(dict(iter=step, tier=tier, path=path, val_loss=loss, bytes=1_493_000_000, save_s=save_s))


def measure(records: int, mixed: bool) -> None:
    """Prints a row for the thousand records before each power of ten."""
    ends = [10**exponent for exponent in range(3, 10) if 10**exponent <= records]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        cfg = Config(optim=OptimConfig(max_iters=records), run=RunConfig(out_dir=folder))
        with contextlib.redirect_stdout(nowhere):
            log = TrainingLogger(cfg, "cost")
            log.report({}, Throughput(8.55e8, 7.98e8, 989.5, 491_520))
        path, start_s, done = log_path(folder, "cost"), time.perf_counter(), 0
        for end in ends:
            with contextlib.redirect_stdout(nowhere):
                for step in range(done, end - 1_000):
                    log_one(log, step, mixed)
                t0_bytes, t0_s, t0_cpu_s = path.stat().st_size, time.perf_counter(), time.process_time()
                for step in range(end - 1_000, end):
                    log_one(log, step, mixed)
            now_s, now_cpu_s, now_bytes, done = time.perf_counter(), time.process_time(), path.stat().st_size, end
            last_thousand = ((now_cpu_s - t0_cpu_s) * 1e3, (now_s - t0_s) * 1e3, (now_bytes - t0_bytes) / 1e3)
            row = (*last_thousand, (now_s - start_s) / end * 1e6, now_bytes / 1e6)
            print(f"{'mixed' if mixed else 'plain'} {end:>12,}" + "".join(f"{figure:>12.1f}" for figure in row))
        with contextlib.redirect_stdout(nowhere):
            log.close("finished")


def main() -> None:
    parser = parser_of("Time and bytes of a record of the run log.")
    parser.add_argument("--records", type=int, default=1_000_000, help="length of the longest run [1000000]")
    args = parser.parse_args()
    print("A record, over the last thousand of them" + " " * 22 + "A record, over all")
    print("run        records      us CPU     us wall       bytes     us wall    file, MB")
    for mixed in (False, True):
        measure(args.records, mixed)


if __name__ == "__main__":
    main()
