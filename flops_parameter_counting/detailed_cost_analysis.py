"""What a model costs, component by component, and what a scaling law says of it.

    python flops_parameter_counting/detailed_cost_analysis.py --model_config configs/models/llama_1.36b.json
    python flops_parameter_counting/detailed_cost_analysis.py --scaling_law configs/scaling_laws/custom/verify_llama_1.36b.jsonc

A model is a JSON file of knobs (`--help` of train.py lists them), a Hugging Face config.json or its folder. A scaling law's file
holds its constants, a model, its tokens, what is expected of them and a compute budget; the command exits with 1 where something
else comes out. JSON may have // and /* */ comments. A path is looked for from where you stand, then beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import Config, DataConfig, ModelConfig, UserError, model_of_file, run_command
from flops import HOFFMANN, ScalingLaw, count_parameters, flops_per_token
from hf_format import model_config
from memory import GPU_MEMORY_GIB
from plan import dtype_on, find_gpu, gpu_note, memory_table

HERE = Path(__file__).resolve().parent
COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.S)  # a string too, so that nothing inside one is a comment


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", help="a model: its knobs, or a Hugging Face config.json or its folder")
    parser.add_argument("--scaling_law", help="a law, and what is to be verified with it")
    parser.add_argument("--compute_budget", type=float, help="FLOPs to spend: gives the best N and D")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in a micro-batch, for the memory [8]")
    parser.add_argument("--num_gpus", type=int, default=1, help="for the memory [1]")
    parser.add_argument("--gpu", default="", help="for the memory [this machine's, or an H200]")
    args = parser.parse_args(argv)
    if not (args.model_config or args.scaling_law or args.compute_budget is not None):
        parser.error("pass --model_config, --scaling_law or --compute_budget")
    numbers = {"batch_size": args.batch_size, "num_gpus": args.num_gpus, "compute_budget": args.compute_budget}
    if wrong := [f"--{name}={value}" for name, value in numbers.items() if value is not None and not 0 < value < math.inf]:
        parser.error(f"{', '.join(wrong)} must be {'numbers' if len(wrong) > 1 else 'a number'} greater than 0")
    model = read_model(find(args.model_config)) if args.model_config else None
    gpu = find_gpu(args.gpu)
    question = read_question(find(args.scaling_law)) if args.scaling_law else Question()
    if args.compute_budget:
        question = dataclasses.replace(question, compute_flops=args.compute_budget)
    if model:
        print("\n".join(cost_lines(model, args.batch_size, args.num_gpus, gpu, gpu_note(args.gpu))))
        question = dataclasses.replace(question, model=model)
    if not (args.scaling_law or args.compute_budget):
        return 0
    lines, is_met = law_lines(question)
    print("\n".join([""] * bool(model) + lines))
    return 0 if is_met else 1


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def find(name: str, *others: Path) -> Path:
    """A file, or a folder's config.json, from where the user stands, else beside this program, else in one of the others.

    Raises UserError.
    """
    for path in (Path(name), *(folder / name for folder in (HERE, *others))):
        if found := next((file for file in (path, path / "config.json") if file.is_file()), None):
            return found
    if Path(name).is_dir():
        raise UserError(f"{name}: a folder without a config.json")
    there = ", ".join(sorted(str(path.relative_to(HERE)) for path in (HERE / "configs").rglob("*.json*")))
    raise UserError(f"{name}: no such file; beside {Path(__file__).name} there are {there}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that may have comments. Raises UserError with line and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    # A comment becomes as many blanks, so that what the parser says of a place is true of the file.
    blank = COMMENT.sub(lambda found: found[0] if found[0][0] == '"' else re.sub(r"[^\n]", " ", found[0]), text)
    try:
        value = json.loads(blank)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {what_is_wrong(blank, error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object in braces, found {type(value).__name__}")
    return value


def what_is_wrong(blank: str, error: json.JSONDecodeError) -> str:
    """What to do where comments or commas, which look right in other languages, are the mistake; else what the parser says.

    `blank` is the text with its comments blanked out.
    """
    before, after = blank[: error.pos].rstrip(), blank[error.pos :].lstrip()
    if after.startswith("/*"):
        return "the comment that begins here has no end: close it with */"
    # Python 3.13 has a message of its own and points to the comma, older ones to the bracket behind it.
    if error.msg.startswith("Illegal trailing comma") or (before.endswith(",") and after[:1] in ("}", "]")):
        return "a comma stands before the closing bracket: take the comma away"
    return error.msg


def read_model(path: Path) -> ModelConfig:
    """The knobs of a model, its vocabulary included. Raises UserError listing every problem."""
    values = read_json(path)
    if "model_type" in values:
        return model_config(values, str(path))[1]
    return model_of_file(values, str(path))


@dataclass(frozen=True)
class Question:
    """What is asked of a scaling law; a path in it is looked for in the file's folder too."""

    law: ScalingLaw = HOFFMANN
    model: ModelConfig | None = None
    parameters: float | None = None  # in place of a model
    tokens: float | None = None
    expected_parameters: float | None = None
    expected_loss: float | None = None
    compute_flops: float | None = None


def read_question(path: Path) -> Question:
    """Raises UserError naming the entry that is wrong."""
    values = read_json(path)
    law_values, expected = values.pop("law", {}), values.pop("expected", {})
    model_path, law_names = values.pop("model_config", None), [field.name for field in dataclasses.fields(ScalingLaw)]
    numbers = {"": values, "law.": law_values, "expected.": expected}
    allowed = {"": ["parameters", "tokens", "compute_budget_flops"], "law.": law_names, "expected.": ["parameters", "loss"]}
    for group, entries in numbers.items():
        if not isinstance(entries, dict):
            raise UserError(f"{path}: {group.rstrip('.')} must be an object in braces")
        for name, value in entries.items():
            if name not in allowed[group]:
                others = ["law", "model_config", "expected"] if not group else []
                raise UserError(f"{path}: {group}{name} is not one of {', '.join(allowed[group] + others)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"{path}: {group}{name}={value!r} is not a number greater than 0")
    return Question(
        law=ScalingLaw(**law_values),
        model=read_model(find(model_path, path.parent)) if model_path else None,
        parameters=values.get("parameters"),
        tokens=values.get("tokens"),
        expected_parameters=expected.get("parameters"),
        expected_loss=expected.get("loss"),
        compute_flops=values.get("compute_budget_flops"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What they cost
# ---------------------------------------------------------------------------------------------------------------------


def cost_lines(model: ModelConfig, batch_size: int, gpus: int, gpu: str, notes: Sequence[str] = ()) -> list[str]:
    """Parameters, training FLOPs a token and memory, by component; `notes` are on the GPU."""
    count, flops = count_parameters(model), flops_per_token(model)
    matrices = count_parameters(dataclasses.replace(model, bias=False, qk_norm=False))
    rows = [
        ("token embedding", count.token_embedding, 0),
        ("position embedding", count.position_embedding, 0),
        ("attention: projections", count.attention, 6 * matrices.attention),
        (f"attention: over {model.block_size:,} tokens", 0, flops - 6 * count.matmul),
        ("feed-forward", count.ffn, 6 * matrices.ffn),
        ("norms", count.norms, 0),
        ("head" + (", tied to the embedding" if model.weight_tying else ""), count.head, 6 * matrices.token_embedding),
    ]
    cfg = Config(model=model, data=DataConfig(batch_size=batch_size, gradient_accumulation_steps=gpus))
    return [
        model.architecture,
        f"{'':32s}{'parameters':>16s}{'':>9s}{'FLOPs a token':>18s}",
        *(
            f"{name:32s}{n:16,d}{100 * n / count.total:8.1f}%{cost:18,d}{100 * cost / flops:8.1f}%"
            for name, n, cost in [*rows, ("total", count.total, flops)]
        ),
        f"{'counted causally':32s}{'':25s}{flops_per_token(model, causal=True):18,d}",
        "",
        f"{gpus} x {gpu}, one micro-step of {batch_size} x {model.block_size:,} tokens on each",
        *notes,
        *memory_table(cfg, dtype_on(gpu, "auto"), gpus, GPU_MEMORY_GIB[gpu]),
    ]


def law_lines(question: Question) -> tuple[list[str], bool]:
    """(what the law says, whether everything expected came out to the digits that were given)."""
    law, model, tokens = question.law, question.model, question.tokens
    n = count_parameters(model).total if model else question.parameters
    loss = law.loss(n, tokens) if n and tokens else None
    checks = [
        ("parameters N", n, question.expected_parameters),
        ("tokens D", tokens, None),
        ("loss", loss, question.expected_loss),
    ]
    lines = [f"L(N, D) = {law.E:g} + {law.A:g} / N^{law.alpha:g} + {law.B:g} / D^{law.beta:g}"]
    is_met = True
    for name, value, expected in checks:
        agrees = expected is None or (value is not None and rounds_to(value, expected))
        is_met &= agrees
        if value is not None or expected is not None:
            verdict = "" if expected is None else f"   expected {expected:.6g}: {'agrees' if agrees else 'DOES NOT AGREE'}"
            lines.append(f"  {name:14s}{'not given' if value is None else f'{value:.6g}'}{verdict}")
    per_token = flops_per_token(model) if model else n and 6 * n
    spent = per_token and tokens and per_token * tokens
    if spent:
        lines.append(f"  {'compute':14s}{spent:.4g} FLOPs, {'attention included' if model else '6 N D'}")
    if budget := question.compute_flops or spent:
        best_n, best_d = law.best_split(budget)
        lines.append(f"a budget of {budget:.4g} FLOPs")
        lines.append(f"  best split, 6 N D: N = {best_n:.4g}, D = {best_d:.4g}, loss {law.loss(best_n, best_d):.3f}")
        if per_token:
            tokens = budget / per_token
            lines.append(f"  this N: D = {tokens:.4g} at {per_token:.4g} FLOPs a token, loss {law.loss(n, tokens):.3f}")
    return lines, is_met


def rounds_to(value: float, expected: float) -> bool:
    """Whether `value` is `expected` in as many digits as that was written with (2.37: two behind the point)."""
    digits = len(f"{expected:.15e}".split("e")[0].rstrip("0").replace(".", ""))
    return float(f"{value:.{digits - 1}e}") == expected


if __name__ == "__main__":
    run_command(main)
