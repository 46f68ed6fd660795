"""hellaswag.py beside EleutherAI's lm-evaluation-harness: the same model, the same items, the same numbers?

    python benchmarks/hellaswag_agreement.py OUT_DIR_OR_FOLDER ... (--source=hellaswag_val.jsonl | --text=FILE) [--items=500]

Needs `pip install lm_eval accelerate`. Each model (a run's out_dir, or a Hugging Face folder) is exported by hf_convert.py, read
by the harness as any model of transformers, and scored in float32 on the CPU or the first GPU. Items come from HellaSwag's own
file, or are made of a text: a passage, the line that follows it, and three lines from elsewhere, with WikiHow's marks strewn in.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from command_line import output_file, parser_of

from configurator import run_command

TASK = """task: hellaswag_here
dataset_path: json
dataset_kwargs: {data_files: {validation: %s}}
output_type: multiple_choice
validation_split: validation
process_docs: !function utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def make_items(text: str, n: int) -> list[dict[str, Any]]:
    """Items in HellaSwag's format: two to six lines, and which line goes on."""
    draw = random.Random(7)
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 15]
    items = []
    for _ in range(n):
        length = draw.randrange(3, 8)
        start = draw.randrange(len(lines) - length)
        passage = lines[start : start + length]
        marks = draw.choice(["", "", " [title] ", " [step] ", "  "])
        endings = draw.sample(lines, 3)
        label = draw.randrange(4)
        endings.insert(label, lines[start + length])
        items.append(
            {
                "activity_label": draw.choice(["Speaking", "Home and Garden", "Playing a part"]),
                "ctx_a": marks.join(passage[:-1]) + draw.choice(["", " [substeps]", "."]),
                "ctx_b": passage[-1][: draw.randrange(0, 20)],
                "endings": [draw.choice(["", "[step] "]) + ending for ending in endings],
                "label": label,
            }
        )
    return items


def theirs(folder: Path, source: Path, tasks: Path) -> dict[str, Any]:
    """acc and acc_norm of the harness, and the log-likelihood of every ending by item."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tasks / "utils.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    (tasks / "hellaswag_here.yaml").write_text(TASK % source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(folder), dtype="float32", batch_size=16, device=device)
    manager = TaskManager(include_path=str(tasks))
    done = lm_eval.simple_evaluate(model=model, tasks=["hellaswag_here"], task_manager=manager, bootstrap_iters=0)
    result = done["results"]["hellaswag_here"]
    samples = sorted(done["samples"]["hellaswag_here"], key=lambda sample: sample["doc_id"])
    scores = [[float(score[0]) for score in sample["filtered_resps"]] for sample in samples]
    return {"acc": result["acc,none"], "acc_norm": result["acc_norm,none"], "scores": scores}


def ours(folder: Path, source: Path, _: Path) -> dict[str, Any]:
    """The same of hellaswag.py."""
    import torch

    from hellaswag import log_likelihoods, prefix_of, read_items, score_of, tokenize
    from parallel import Ranks
    from pretrained import load_model, open_pretrained

    pretrained, device = (
        open_pretrained(str(folder)),
        torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"),
    )
    questions = tokenize(read_items(source), pretrained.load_tokenizer(), pretrained.cfg.block_size, prefix_of(pretrained))
    scores = log_likelihoods(load_model(pretrained, device, torch.float32), questions, Ranks(0, 1, device))
    score = score_of(scores, questions)
    return {"acc": score.acc, "acc_norm": score.acc_norm, "scores": scores.tolist()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("models", nargs="*", help="a run's out_dir or a Hugging Face folder")
    parser.add_argument("--source", type=Path, help="items as HellaSwag publishes them")
    parser.add_argument("--text", type=Path, help="a text that items are made of")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--keep_items", type=output_file, help="write the items here as well, for hellaswag.py --source")
    parser.add_argument("--json", type=output_file, help="write the figures here as well")
    args = parser.parse_args()
    if bool(args.source) == bool(args.text):
        parser.error("pass --source or --text")
    from hf_convert import export_model
    from pretrained import open_pretrained

    rows = {}
    with tempfile.TemporaryDirectory() as name:
        items, tasks = Path(name) / "items.jsonl", Path(name) / "tasks"
        tasks.mkdir()
        if args.source:
            lines = args.source.read_text(encoding="utf-8").splitlines()[: args.items]
        else:
            lines = [json.dumps(item) for item in make_items(args.text.read_text(encoding="utf-8"), args.items)]
        items.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if args.keep_items:
            shutil.copy(items, args.keep_items)
        for number, source in enumerate(args.models):
            folder = Path(name) / str(number)
            export_model(open_pretrained(source), folder, "float32", 2 * 10**9)
            instants = [time.perf_counter()]
            results = []
            for score in (theirs, ours):
                results.append(score(folder, items, tasks))
                instants.append(time.perf_counter())
            pairs = zip(*(itertools.chain.from_iterable(result.pop("scores")) for result in results), strict=True)
            rows[source] = {
                "lm_eval": results[0],
                "ours": results[1],
                "largest_difference": max(abs(one - other) for one, other in pairs),
                "seconds": [round(b - a, 1) for a, b in itertools.pairwise(instants)],
            }
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for source, row in rows.items():
        print(f"{source}: largest difference of a log-likelihood {row['largest_difference']:.1e}")
        for name, seconds in zip(("lm_eval", "ours"), row["seconds"], strict=True):
            print(f"  {name:8s} acc {row[name]['acc']:.4f}  acc_norm {row[name]['acc_norm']:.4f}  {seconds:.1f} s")


if __name__ == "__main__":
    run_command(lambda argv: main())
