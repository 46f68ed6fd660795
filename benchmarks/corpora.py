"""The prepare.py of the large datasets on a local copy of what the hub has: tokens a second, memory, a kill, and threads.

    python benchmarks/corpora.py --gigabytes 1 --text FILE [--llama_tokenizer tokenizer.model]

Each dataset's own script runs as users run it, in a folder that holds `Skylion007/openwebtext` and the like, which the `datasets`
library reads in place of the hub: .parquet for openwebtext and fineweb_edu, .jsonl with a validation split for slimpajama. The
documents are paragraphs of FILE in random order. Each dataset is prepared twice: with all cores, and with --num_proc 1, killed
(SIGKILL) in the middle and started again. Both must give the same files.
"""

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
from command_line import parser_of

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
    parser = parser_of(__doc__)
    parser.add_argument("datasets", nargs="*", default=["openwebtext", "slimpajama_6b_gpt2"], help=f"of {', '.join(HUB)}")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of text for each dataset (default 1)")
    parser.add_argument("--text", type=Path, required=True, help="a text file whose paragraphs make up the documents")
    parser.add_argument("--llama_tokenizer", type=Path, help="stands for the gated one of slimpajama_6b_llama")
    args = parser.parse_args()
    print("| dataset | s | MB/s | tokens/s | peak RSS, MiB | of it anonymous | documents | train tokens |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for dataset in args.datasets:
            folder = Path(name) / dataset
            write_copy(folder, *HUB[dataset], args.text.read_text(encoding="utf-8"), int(args.gigabytes * 1e9))
            flags = ["--tokenizer", str(args.llama_tokenizer.resolve())] if dataset.endswith("llama") else []
            run = Preparation(folder, dataset, flags)
            run.report(run.start("whole", os.cpu_count()))
            half = (folder / "whole" / "train.bin").stat().st_size // 2
            run.start("killed", 1, kill_at_bytes=half)
            run.start("killed", 1)
            same = run.hashes("whole") == run.hashes("killed")
            print(f"{dataset}: killed at half of train.bin, started again, one thread: same files: {same}", flush=True)
            shutil.rmtree(folder)
            if not same:
                sys.exit(1)


def documents(text: str, n_bytes: int, seed: str) -> Iterator[str]:
    """Up to 20 paragraphs each, in random order, until there are so many bytes."""
    paragraphs, draw = text.split("\n\n"), random.Random(seed)
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
                file.writelines(json.dumps({"text": document}) + "\n" for document in documents(text, size, split))
        else:
            rows = list(documents(text, size, split))
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), out / f"{split}.parquet", row_group_size=ROWS)


class Preparation:
    """Runs of one dataset's prepare.py in a folder that stands for the hub."""

    def __init__(self, folder: Path, dataset: str, flags: list[str]) -> None:
        self.folder, self.dataset, self.flags = folder, dataset, flags

    def start(self, out: str, threads: int, kill_at_bytes: int | None = None) -> dict[str, float]:
        """Runs it to its end, or until train.bin has so many bytes: seconds, and memory at its peak."""
        script = str(ROOT / "data" / self.dataset / "prepare.py")
        command = [sys.executable, script, "--out", str(self.folder / out), "--num_proc", str(threads), *self.flags]
        environment = os.environ | {"HF_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        part, peaks, t0_s = self.folder / out / "parts" / "train.bin", {"VmHWM": 0.0, "RssAnon": 0.0}, time.perf_counter()
        process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            peaks = {name: max(peak, memory(process.pid, name)) for name, peak in peaks.items()}
            if kill_at_bytes and part.exists() and part.stat().st_size >= kill_at_bytes:
                process.kill()
            time.sleep(0.05)
        if process.returncode != (-9 if kill_at_bytes else 0):
            sys.exit(f"exit code {process.returncode}: {process.stderr.read().decode()}")
        return {"elapsed_s": time.perf_counter() - t0_s, **peaks}

    def report(self, figures: dict[str, float]) -> None:
        manifest = json.loads((self.folder / "whole" / "manifest.json").read_text())
        splits = [manifest["train"], manifest["val"]]
        tokens, n_bytes, documents = (sum(each[key] for each in splits) for key in ("tokens", "bytes", "documents"))
        elapsed_s, peak_mib, anonymous_mib = figures.values()
        print(
            f"| {self.dataset} | {elapsed_s:.0f} | {n_bytes / 1e6 / elapsed_s:.1f} | {tokens / elapsed_s:,.0f} | {peak_mib:,.0f} "
            f"| {anonymous_mib:,.0f} | {documents:,} | {manifest['train']['tokens']:,} |",
            flush=True,
        )

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
