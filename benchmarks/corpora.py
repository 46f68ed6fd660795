"""The prepare.py of the large datasets on a local copy of what the hub has: tokens a second, memory, a kill, and threads.

    python benchmarks/corpora.py --gigabytes 1 --text FILE [--llama_tokenizer tokenizer.model]

Each dataset's own script runs as users run it, in a folder that holds `Skylion007/openwebtext` and the like, which the `datasets`
library reads in place of the hub: .parquet for openwebtext and fineweb_edu, .jsonl with a validation split for slimpajama. The
documents are paragraphs of FILE in random order. Each dataset is prepared twice: with all cores, and with --num_proc 1, killed
(SIGKILL) in the middle and started again. Both must give the same files.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from configurator import ROOT

HUB = {  # dataset -> its name on the hub, and how the copy is written
    "openwebtext": ("Skylion007/openwebtext", "parquet"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "parquet"),
    "slimpajama_6b_gpt2": ("DKYoon/SlimPajama-6B", "jsonl"),
    "slimpajama_6b_llama": ("DKYoon/SlimPajama-6B", "jsonl"),
}
FINEWEB_CONFIGS = "---\nconfigs:\n- config_name: sample-10BT\n  data_files: train-*.parquet\n---\n"
ROWS = 1000  # of a parquet file's row group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", default=["openwebtext", "slimpajama_6b_gpt2"], help=f"of {', '.join(HUB)}")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of text for each dataset (default 1)")
    parser.add_argument("--text", type=Path, required=True, help="a text file whose paragraphs make up the documents")
    parser.add_argument("--llama_tokenizer", type=Path, help="stands for the gated one of slimpajama_6b_llama")
    args = parser.parse_args()
    print("| dataset | threads | s | MB/s | tokens/s | peak RSS, MiB | of it anonymous | documents | train tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for dataset in args.datasets:
            folder = Path(name) / dataset
            write_copy(folder, *HUB[dataset], args.text.read_text(encoding="utf-8"), int(args.gigabytes * 1e9))
            flags = ["--tokenizer", str(args.llama_tokenizer.resolve())] if dataset.endswith("llama") else []
            run = Preparation(folder, dataset, flags)
            whole_s = run.start("whole", os.cpu_count())
            killed_s = run.start("killed", 1, kill_after_s=whole_s / 2)
            run.start("killed", 1)
            same = run.hashes("whole") == run.hashes("killed")
            print(f"{dataset}: killed after {killed_s:.0f} s and started again with one thread: same files: {same}", flush=True)
            shutil.rmtree(folder)
            if not same:
                sys.exit(1)


def documents(text: str, n_bytes: int) -> Iterator[str]:
    """Up to 20 paragraphs each, in random order, until there are so many bytes."""
    paragraphs, draw = text.split("\n\n"), random.Random(0)
    while n_bytes > 0:
        document = "\n\n".join(draw.choices(paragraphs, k=draw.randint(1, 20)))
        n_bytes -= len(document.encode())
        yield document


def write_copy(folder: Path, name: str, kind: str, text: str, n_bytes: int) -> None:
    """What the hub has of the dataset, in four files and where the hub's has one a validation split."""
    out = folder / name
    out.mkdir(parents=True)
    if "fineweb" in name:
        (out / "README.md").write_text(FINEWEB_CONFIGS)
    splits = [f"train-{number:05d}-of-00004" for number in range(4)]
    sizes = dict.fromkeys(splits, n_bytes // 4) | ({"validation-00000-of-00001": n_bytes // 200} if kind == "jsonl" else {})
    for split, size in sizes.items():
        if kind == "jsonl":
            with (out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": document}) + "\n" for document in documents(text, size))
        else:
            rows = list(documents(text, size))
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), out / f"{split}.parquet", row_group_size=ROWS)


class Preparation:
    """Runs of one dataset's prepare.py in a folder that stands for the hub."""

    def __init__(self, folder: Path, dataset: str, flags: list[str]) -> None:
        self.folder, self.dataset, self.flags = folder, dataset, flags

    def start(self, out: str, threads: int, kill_after_s: float | None = None) -> float:
        """Runs it to its end, and prints a row, or kills it. Returns the seconds it ran."""
        script = str(ROOT / "data" / self.dataset / "prepare.py")
        command = [sys.executable, script, "--out", str(self.folder / out), "--num_proc", str(threads), *self.flags]
        environment = os.environ | {"HF_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        t0_s = time.perf_counter()
        process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        peak_mib = anonymous_mib = 0.0
        while process.poll() is None:
            peak_mib, anonymous_mib = (
                max(peak_mib, memory(process.pid, "VmHWM")),
                max(anonymous_mib, memory(process.pid, "RssAnon")),
            )
            if kill_after_s is not None and time.perf_counter() - t0_s > kill_after_s:
                process.kill()
            time.sleep(0.2)
        elapsed_s = time.perf_counter() - t0_s
        if kill_after_s is None:
            if process.returncode:
                sys.exit(process.stderr.read().decode())
            manifest = json.loads((self.folder / out / "manifest.json").read_text())
            splits = [manifest["train"], manifest["val"]]
            tokens, megabytes = sum(each["tokens"] for each in splits), sum(each["bytes"] for each in splits) / 1e6
            print(
                f"| {self.dataset} | {threads} | {elapsed_s:.0f} | {megabytes / elapsed_s:.1f} | {tokens / elapsed_s:,.0f} "
                f"| {peak_mib:,.0f} | {anonymous_mib:,.0f} | {sum(each['documents'] for each in splits):,} "
                f"| {manifest['train']['tokens']:,} |",
                flush=True,
            )
        return elapsed_s

    def hashes(self, out: str) -> list[str]:
        manifest = json.loads((self.folder / out / "manifest.json").read_text())
        return [manifest[split]["sha256"] for split in ("train", "val")]


def memory(pid: int, field: str) -> float:
    """MiB, out of /proc; 0 when the process has just ended."""
    try:
        return int(Path(f"/proc/{pid}/status").read_text().split(f"{field}:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


if __name__ == "__main__":
    main()
