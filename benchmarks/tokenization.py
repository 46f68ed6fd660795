"""Preparing a dataset, start to end, against tiktoken's own batch encoding of the same documents in memory.

Ours reads documents from a .jsonl file, tokenises, writes, journals, hashes and publishes; tiktoken's encode_ordinary_batch
only encodes. Both use the same number of threads, each run is a process of its own, and they take turns (A B A B ...).
`--gigabytes` then prepares one single text file of that size, to show that memory stays flat.

    python benchmarks/tokenization.py --megabytes 64 --gigabytes 1
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from itertools import cycle
from pathlib import Path

from command_line import parser_of

from data.corpus import Recipe, prepare
from data.source import local_source


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--megabytes", type=float, default=64, help="size of the comparison (default 64)")
    parser.add_argument("--gigabytes", type=float, default=0, help="size of the single text file (default 0: leave it out)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (default: all cores)")
    parser.add_argument("--run", choices=["tiktoken", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_side(args.run, args.file, args.threads)
        return
    print(f"{'side':<34} {'MB':>7} {'threads':>7} {'median s':>9} {'MB/s':>7} {'spread %':>8} {'CPU s':>7} {'peak RSS MiB':>12}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.jsonl"
        write_documents(file, int(args.megabytes * 1e6))
        runs: dict[str, list[dict]] = {"tiktoken": [], "ours": []}
        for _ in range(args.rounds):
            for side, results in runs.items():
                results.append(in_process(side, file, args.threads))
        rates = {
            "tiktoken": report("tiktoken encode_ordinary_batch", runs["tiktoken"], args.threads),
            "ours": report("ours, .jsonl to dataset", runs["ours"], args.threads),
        }
        print(f"ours / tiktoken: {rates['ours'] / rates['tiktoken']:.2f} (of the medians)")
        if args.gigabytes:
            file = Path(folder) / "text.txt"
            write_text(file, int(args.gigabytes * 1e9))
            report("ours, one text file to dataset", [in_process("ours", file, args.threads)], args.threads)


def report(name: str, runs: list[dict], threads: int) -> float:
    """Prints a row, and returns the median rate in MB/s."""
    times_s = sorted(run["elapsed_s"] for run in runs)
    median_s = statistics.median(times_s)
    megabytes = runs[0]["text_bytes"] / 1e6
    spread_percent = 100 * (times_s[-1] - times_s[0]) / median_s
    cpu_s = statistics.median(run["cpu_s"] for run in runs)  # what other programs on the machine hardly change
    peak_mib = max(run["peak_rss_mib"] for run in runs)
    rate = megabytes / median_s
    print(
        f"{name:<34} {megabytes:>7.0f} {threads:>7} {median_s:>9.2f} {rate:>7.1f} {spread_percent:>8.1f} {cpu_s:>7.2f} "
        f"{peak_mib:>12.0f}"
    )
    return rate


def in_process(side: str, file: Path, threads: int) -> dict:
    command = [sys.executable, __file__, "--run", side, "--file", str(file), "--threads", str(threads)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def run_side(side: str, file: Path, threads: int) -> None:
    """One run, in a process of its own; the vocabulary is loaded before the clock starts. Prints a line of JSON."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    if side == "tiktoken":
        documents = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
        text_bytes = sum(len(text.encode()) for text in documents)
        t0_s, cpu0_s = time.perf_counter(), time.process_time()
        encoding.encode_ordinary_batch(documents, num_threads=threads)
        elapsed_s, cpu_s = time.perf_counter() - t0_s, time.process_time() - cpu0_s
    else:
        with tempfile.TemporaryDirectory(dir=file.parent) as out:
            recipe = Recipe(Path(out), "gpt2", 0.01, local_source)
            t0_s, cpu0_s = time.perf_counter(), time.process_time()
            prepare(recipe, ["--source", str(file), "--num_proc", str(threads)])
            elapsed_s, cpu_s = time.perf_counter() - t0_s, time.process_time() - cpu0_s
            manifest = json.loads((Path(out) / "manifest.json").read_text())
            text_bytes = manifest["train"]["bytes"] + manifest["val"]["bytes"]
    status = Path("/proc/self/status").read_text()  # getrusage's peak would be the parent's, if that is higher
    peak_rss_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"elapsed_s": elapsed_s, "cpu_s": cpu_s, "text_bytes": text_bytes, "peak_rss_mib": peak_rss_mib}))


def standard_library() -> list[str]:
    """Real text that every machine has: the standard library's source files, the tests of it included."""
    texts = (path.read_bytes().decode("utf-8", "replace") for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")))
    return [text for text in texts if text]


def write_documents(path: Path, n_bytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in cycle(standard_library()):
            file.write(json.dumps({"text": text}) + "\n")
            if file.tell() >= n_bytes:
                return


def write_text(path: Path, n_bytes: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        for text in cycle(standard_library()):
            file.write(text)
            if file.tell() >= n_bytes:
                return


if __name__ == "__main__":
    main()
