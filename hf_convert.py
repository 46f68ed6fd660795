"""Models for Hugging Face, and from there: `python hf_convert.py export out hf_dir`, `python hf_convert.py import hf_dir out`.

export writes what `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load: config.json, safetensors, tokenizer,
generation_config.json, and a model card out of the run's log. import writes weights as a checkpoint that sample.py and
`train.py --init_from=out` take. Both name a folder that is not there yet, and it appears when it is whole.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from configurator import NOT_SHAPE, Config, ModelConfig, UserError, answer_early, run_command

DTYPES = ("float32", "bfloat16", "float16")


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; raises UserError."""
    parser = argparse.ArgumentParser(prog="hf_convert.py", description="Convert a model to or from a Hugging Face folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="a checkpoint becomes a folder that transformers loads")
    export.add_argument("source", help="an out_dir, one of its checkpoints, or nanoGPT's ckpt.pt")
    export.add_argument("hf_dir", type=Path, help="the folder to write")
    export.add_argument("--checkpoint", default="best", help="best (latest where there is none), latest, or a tier's name [best]")
    export.add_argument("--data_dir", default="", help="the folder that holds the run's dataset, for its tokenizer [the run's]")
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights [float32, as they were trained]")
    export.add_argument("--shard_gb", type=float, default=2.0, help="size of a weights file at most, GB [2]")
    import_ = commands.add_parser("import", help="a model of transformers or nanoGPT becomes a checkpoint")
    import_.add_argument("source", help="a folder, a name on the hub such as gpt2, or nanoGPT's ckpt.pt")
    import_.add_argument("out", type=Path, help="the out_dir to write: its checkpoint is checkpoints/latest")
    import_.add_argument("--block_size", type=int, help="crop the context to so many tokens")
    import_.add_argument("--data_dir", default="", help="of a ckpt.pt: the folder that holds its dataset, for its tokenizer")
    args = parser.parse_args(argv)
    if args.command == "export" and not 0 < args.shard_gb < math.inf:
        raise UserError(f"--shard_gb={args.shard_gb:g}: it must be a number greater than 0, such as 2")
    return args


if __name__ == "__main__":  # before torch, which takes seconds to import
    answer_early(arguments)

import contextlib
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from checkpoint import FOLDER, TOKENIZER_FOLDER
from checkpoint_files import Checkpoint, sync, write_checkpoint
from data.tokenizer import Tokenizer
from flops import count_parameters, flops_per_token
from hf_format import FAMILIES, config_json, layout, model_type_of, parameter_shapes, theirs_from_ours, write_tensors
from pretrained import Pretrained, open_pretrained
from run_file import log_path

if TYPE_CHECKING:
    from visualize_training import Run

CARD, PICTURE = "README.md", "loss_curve.png"


def main(argv: list[str]) -> int:
    args = arguments(argv)
    if args.command == "export":
        pretrained = open_pretrained(args.source, args.checkpoint, args.data_dir)
        export_model(pretrained, args.hf_dir, args.dtype, int(args.shard_gb * 1e9))
        print(f"{pretrained.name} is now {args.hf_dir}: AutoModelForCausalLM.from_pretrained({str(args.hf_dir)!r})")
    else:
        pretrained = open_pretrained(args.source, data_dir=args.data_dir, block_size=args.block_size)
        import_model(pretrained if args.block_size is None else pretrained.cropped(args.block_size), args.out)
        print(
            f"{pretrained.name} is now {args.out}: python sample.py --out_dir={args.out}; python train.py --init_from={args.out}"
        )
    return 0


@contextlib.contextmanager
def published(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end of the block, or vanishes with whatever goes wrong in it.

    Raises UserError where the target is there already, or where it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: name another folder, or move it away")
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
        partial.mkdir(parents=True)
        if needed_bytes > (free_bytes := shutil.disk_usage(partial).free):
            raise UserError(f"{target} takes {needed_bytes:,} bytes, and {free_bytes:,} are free there: name another folder")
        yield partial
        for file in partial.iterdir():
            sync(file)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def export_model(pretrained: Pretrained, folder: Path, dtype: str, shard_bytes: int) -> None:
    """Writes the model as a Hugging Face folder. Raises UserError, also where transformers has no such model."""
    import torch

    cfg, config = pretrained.cfg, config_json(pretrained.cfg)
    tokenizer = pretrained.load_tokenizer()
    special = special_ids(tokenizer, cfg.vocab_size)
    config |= {"torch_dtype": dtype} | {name: id for name, id in special.items() if name != "suppress_tokens"}
    tensors = {tensor.name: tensor for tensor in layout(FAMILIES[model_type_of(cfg)], cfg, config)}
    read = lru_cache(1)(pretrained.read)  # theirs may share one of ours, and follow one another
    torch_dtype = getattr(torch, dtype)
    with published(folder, count_parameters(cfg).total * torch_dtype.itemsize) as partial:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        write_tensors(partial, shapes, torch_dtype, lambda name: theirs_from_ours(tensors[name], read), shard_bytes)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", special)
        write_tokenizer(partial, tokenizer, cfg.block_size, is_plain=not pretrained.is_foreign)
        write_card(partial, folder.name, pretrained)


def special_ids(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What generation has to know: where a text ends and starts, and the ids that only pad the vocabulary."""
    # It stands between documents, so it also starts one. Where there is none null says so: left out, they are 1 and 2 for LLaMA.
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_id)
    if tokenizer.vocab_size < vocab_size:
        ids["suppress_tokens"] = list(range(tokenizer.vocab_size, vocab_size))
    return ids


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int, is_plain: bool = True) -> None:
    """tokenizer.json, and what AutoTokenizer needs beside it. `is_plain` leaves out what its maker puts around a text."""
    import tokenizers

    definition = tokenizer.to_json()
    if is_plain:
        definition = json.dumps(json.loads(definition) | {"post_processor": None}, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8", newline="")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    settings["clean_up_tokenization_spaces"] = False
    if tokenizer.eot_id is not None:
        token = tokenizers.Tokenizer.from_str(definition).id_to_token(tokenizer.eot_id)
        settings |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------


def write_card(folder: Path, title: str, pretrained: Pretrained) -> None:
    """README.md: what the model is and how it was trained, as the run's log has it, with a picture of its loss."""
    run = run_of(pretrained.checkpoint) if pretrained.checkpoint else None
    n_parameters = count_parameters(pretrained.cfg).total
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: other  # for you to choose\n---",
        f"# {title}",
        f"A language model of {n_parameters:,} parameters, `{pretrained.cfg.architecture}`, trained with nanotrain.",
        table("Architecture", run.startup_info.get("model", {}) if run else architecture(pretrained.cfg)),
    ]
    if run and pretrained.checkpoint:
        draw_loss_curve(run, folder / PICTURE)
        parts += [table("Training", training(run, pretrained)), f"![Loss by step]({PICTURE})", evaluations(run)]
        data = {
            name: value for name, value in run.startup_info.get("data", {}).items() if name != "folder"
        }  # a path of this machine
        parts += [table("Data", data), table("Hardware", run.startup_info.get("hardware", {}))]
    parts += [
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = (Auto.from_pretrained("FOLDER") for Auto in (AutoModelForCausalLM, AutoTokenizer))\n```',
        "A base model: it continues text. In its training an end-of-text token stood between documents.",
        "## Licence\n\nNot stated yet: whoever publishes this model chooses one, and says where its data came from.",
    ]
    (folder / CARD).write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def run_of(checkpoint: Checkpoint) -> Run | None:
    """The log of the run that the checkpoint is of; None where it is not there, or has no training iteration."""
    from visualize_training import LogError, read_run

    try:
        return read_run(log_path(checkpoint.path.parent.parent, checkpoint.state["run_name"]))
    except LogError:
        return None


def architecture(cfg: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(cfg).items() if name not in NOT_SHAPE}


def training(run: Run, pretrained: Pretrained) -> dict[str, Any]:
    """How far the checkpoint was trained, what that cost, and with which knobs."""
    assert pretrained.checkpoint is not None
    counters, knobs = pretrained.checkpoint.state["counters"], run.knobs
    tokens = counters["samples"] * knobs["block_size"]
    names = "learning_rate min_lr lr_schedule warmup_iters weight_decay beta1 beta2 grad_clip dropout seed".split()
    return {
        "run": run.name,
        "checkpoint": pretrained.checkpoint.path.name,
        "steps": counters["step"],
        "tokens": tokens,
        "training_flops": f"{tokens * flops_per_token(pretrained.cfg):.4g}",
        "tokens_per_step": knobs["batch_size"] * knobs["gradient_accumulation_steps"] * knobs["block_size"],
        "tokens_per_second": run.summary.get("avg_tokens_per_sec"),
        **{name: knobs[name] for name in names if name in knobs},
    }


def evaluations(run: Run) -> str:
    """The run's last evaluations of the loss, and the last one of HellaSwag."""
    if not run.eval_steps:
        return ""
    columns = [name for name in run.eval_steps[-1] if name not in ("lr", "tokens", "wall_s")]
    head = f"| {' | '.join(name.replace('_', ' ') for name in columns)} |\n|{'---|' * len(columns)}\n"
    rows = [" | ".join(cell(each.get(name)) for name in columns) for each in run.eval_steps[-5:]]
    scores = [f"\n\nAt {event['message']}" for event in run.events if event["kind"] == "score"][-1:]
    return "## Evaluations\n\n" + head + "\n".join([f"| {row} |" for row in rows]) + "".join(scores)


def draw_loss_curve(run: Run, path: Path) -> None:
    from matplotlib.figure import Figure

    from visualize_training import draw_loss, window_of

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    draw_loss(figure.add_subplot(), run, window_of(run, None))
    figure.savefig(path, dpi=110)


def table(title: str, values: dict[str, Any]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {cell(value)} |" for name, value in values.items() if value is not None]
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(rows) if rows else ""


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if type(value) is int else f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


def import_model(pretrained: Pretrained, out: Path) -> None:
    """Writes the weights as out/checkpoints/latest, with no optimizer beside them, and out/tokenizer. Raises UserError."""
    cfg = pretrained.cfg
    with published(out, 4 * count_parameters(cfg).total) as partial:
        state = state_of_import(pretrained)
        try:
            tokenizer = pretrained.load_tokenizer()
        except UserError as error:
            print(f"imported without a tokenizer: {error}")
        else:
            state["data"] |= {"vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash}
            (partial / TOKENIZER_FOLDER).mkdir()
            tokenizer.save(partial / TOKENIZER_FOLDER)
        (partial / FOLDER).mkdir()
        weights = {f"model.{name}": pretrained.read(name).float().clone() for name in parameter_shapes(cfg)}
        about = {"run_name": state["run_name"], "iter": 0, "val_loss": None}
        write_checkpoint(partial / FOLDER / "latest", weights, json.dumps(state, indent=1), about)


def state_of_import(pretrained: Pretrained) -> dict[str, Any]:
    """What train.py writes beside the weights, as far as it is known of them."""
    cfg = Config(model=pretrained.cfg)
    unknown = dict.fromkeys(("dataset", "tokenizer_hash", "train_tokens", "val_tokens", "train_sha256", "val_sha256"))
    return {
        "run_name": f"import_{datetime.now(UTC):%Y%m%d_%H%M%S}",
        "weights_only": True,
        "imported_from": pretrained.name,
        "val_loss": None,
        "counters": {"step": 0, "samples": 0},
        "rng": {},
        "config": {"values": cfg.values(), "origins": {}},
        "model": architecture(pretrained.cfg),
        "data": {**unknown, "vocab_size": pretrained.cfg.vocab_size},
    }


if __name__ == "__main__":
    run_command(main)
