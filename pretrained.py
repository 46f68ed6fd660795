"""Weights that are there already, wherever they come from, behind one interface: `open_pretrained`.

A source is the out_dir of a run or one checkpoint of it, a Hugging Face folder, the name of a model on the hub, or the ckpt.pt
of nanoGPT. Whatever it is, it has knobs, a tokenizer, and weights that are read one parameter at a time.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint import FOLDER, Checkpoint, checkpoints_of, find_checkpoint, is_checkpoint, tokenizer_folder
from configurator import GPT2_MODELS, NOT_SHAPE, Config, DataConfig, ModelConfig, UserError, model_of_file, section_from
from data.source import go_offline_without_network
from data.tokenizer import Gpt2Tokenizer, Tokenizer, load_tokenizer, open_tokenizer, same_ids
from data.tokens import GPT2_VOCAB_SIZE, Dataset, dataset_folder, padded_vocab_size
from hf_format import CONFIG, FAMILIES, READ_AS, TensorFolder, layout, model_config, ours_from_theirs, parameter_shapes

if TYPE_CHECKING:
    import torch

    from kernels import Operations
    from model import Transformer

HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
NANOGPT = "ckpt.pt"


@dataclass(frozen=True)
class Pretrained:
    """A model that can be loaded."""

    name: str  # for people
    cfg: ModelConfig
    read: Callable[[str], torch.Tensor]  # a parameter by our name, on the CPU, in the dtype that it is stored in
    load_tokenizer: Callable[[], Tokenizer]  # raises UserError where there is none, or one of another vocabulary
    checkpoint: Checkpoint | None = None  # where it is one of ours
    is_foreign: bool = False  # trained by others: a text begins as the tokenizer's maker has it, where ours begins plainly

    def encode_prompt(self, text: str) -> list[int]:
        tokenizer = self.load_tokenizer()
        return tokenizer.encode_prompt(text) if self.is_foreign else tokenizer.encode(text)

    def cropped(self, block_size: int) -> Pretrained:
        """The same with a shorter context. Raises UserError for a longer one, or none."""
        if not 1 <= block_size <= self.cfg.block_size:
            context = self.cfg.block_size
            raise UserError(f"--block_size={block_size}: {self.name} has a context of {context}; pass 1 to {context}")

        def read(name: str) -> torch.Tensor:
            tensor = self.read(name)
            return tensor[:block_size] if name == "position_embedding.weight" else tensor

        return replace(self, cfg=replace(self.cfg, block_size=block_size), read=read)


def open_pretrained(
    source: str, which: str = "best", data_dir: str = "", needs_weights: bool = True, block_size: int | None = None
) -> Pretrained:
    """The model that `source` names; a local folder or file goes before the hub.

    Of an out_dir `which` names the checkpoint (best falls back to latest), and `data_dir` the folder that holds the run's
    dataset, for its tokenizer; empty takes the run's own. Weights that are not needed are not downloaded. `block_size` is what
    the caller will crop the context to. Raises UserError.
    """
    path = Path(source)
    if (path / NANOGPT).is_file() and not (path / CONFIG).is_file() and not is_checkpoint(path) and not checkpoints_of(path):
        path /= NANOGPT  # the model's name says so
    if path.is_dir() and not (path / CONFIG).is_file():
        return _of_checkpoint(path, which, data_dir)
    if which != "best":
        raise UserError(f"--checkpoint={which}: {source} is a model by itself, without checkpoints; leave it out")
    if path.is_file():
        return _of_nanogpt(path, data_dir)
    folder = path if path.is_dir() else _download(source, HUB_FILES if needs_weights else (CONFIG,))
    return _of_folder(folder, source, needs_weights, block_size)


def load_model(pretrained: Pretrained, device: torch.device, dtype: torch.dtype, ops: Operations | None = None) -> Transformer:
    """The model in evaluation mode: weights in `dtype`, the norms' in float32. It computes in `dtype` without autocast."""
    import torch

    from model import Transformer

    with torch.device("meta"):
        model = Transformer(pretrained.cfg, *filter(None, [ops]))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.to(dtype)  # its shape only, so far
    model.to_empty(device=device).fill_rope_tables()
    load_weights(model, pretrained)
    return model.eval()


def load_weights(
    model: Transformer,
    pretrained: Pretrained,
    put: Callable[[torch.Tensor, torch.Tensor], Any] = lambda p, values: p.copy_(values),
) -> None:
    """Gives every parameter of a model of the same shape its values: `put(parameter, values)`, values on the CPU."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            put(parameter, pretrained.read(name))


def with_pretrained(cfg: Config, needs_weights: bool = True) -> tuple[Config, Pretrained | None]:
    """(the configuration with the model's shape as `init_from`'s weights have it, those weights); as it is where there are none.

    `block_size` may be less than theirs. Raises UserError, also where another knob of the model was given another value.
    """
    if not cfg.checkpoint.pretrained:
        return cfg, None
    given = {name for name in vars(cfg.model) if cfg.is_given(name)}
    block_size = cfg.model.block_size if "block_size" in given else None
    pretrained = open_pretrained(cfg.checkpoint.pretrained, needs_weights=needs_weights, block_size=block_size)
    if block_size is not None:
        pretrained = pretrained.cropped(block_size)
    shape = {name: value for name, value in vars(pretrained.cfg).items() if name not in NOT_SHAPE}
    differing = [
        f"{name}={getattr(cfg.model, name)!r} ({cfg.origins[name]})"
        for name in given & shape.keys()
        if getattr(cfg.model, name) != shape[name]
    ]
    if differing:
        raise UserError(f"{pretrained.name} has another {', '.join(sorted(differing))}: leave these knobs out, its own are taken")
    origins = cfg.origins | dict.fromkeys(shape, f"--init_from={cfg.checkpoint.pretrained}")
    return replace(cfg, model=replace(cfg.model, **shape), origins=origins), pretrained


def check_tokenizer(pretrained: Pretrained, dataset: Dataset) -> None:
    """Raises UserError where the weights were trained on other tokens than the dataset's, as far as both tokenizers are known."""
    try:
        same = same_ids(load_tokenizer(dataset), pretrained.load_tokenizer())
    except UserError:
        return
    if not same:
        raise UserError(
            f"{pretrained.name} has another tokenizer than {dataset.folder}: prepare the data with its own, "
            "prepare.py --tokenizer=..."
        )


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint of ours
# ---------------------------------------------------------------------------------------------------------------------


def _of_checkpoint(path: Path, which: str, data_dir: str) -> Pretrained:
    if is_checkpoint(path):
        path, which = path.parent.parent, str(path)
    elif which == "best" and "best_model" not in dict(checkpoints_of(path)):
        which = "latest"
    checkpoint = find_checkpoint(path, which, lambda line: print(line, file=sys.stderr))
    if checkpoint is None:
        raise UserError(
            f"{path} holds no checkpoint and no {CONFIG}: name the out_dir of a run that saved one, or a model's folder"
        )
    cfg = section_from(ModelConfig, checkpoint.state["config"]["values"])

    def read(name: str) -> torch.Tensor:
        return checkpoint.read_tensors([f"model.{name}"])[f"model.{name}"]

    name = f"{checkpoint.path}, step {checkpoint.iter}"
    tokenizer, is_foreign = cache(partial(_tokenizer_of_run, checkpoint, data_dir)), checkpoint.state.get("weights_only", False)
    return Pretrained(name, cfg, read, tokenizer, checkpoint, is_foreign)


def _tokenizer_of_run(checkpoint: Checkpoint, data_dir: str) -> Tokenizer:
    """The tokenizer that the run keeps beside its checkpoints; failing that its dataset's, whose tokens need not be here."""
    state = checkpoint.state
    data = section_from(DataConfig, state["config"]["values"])
    own = tokenizer_folder(checkpoint.path.absolute().parent)
    prepared = dataset_folder(replace(data, data_dir=data_dir or data.data_dir))
    errors = []
    for folder in [own, prepared] if own.is_dir() and not data_dir else [prepared]:
        try:
            tokenizer = load_tokenizer(Dataset.without_tokens(folder, state["data"]["vocab_size"]))
            if state["data"].get("tokenizer_hash") in (None, tokenizer.hash):
                return tokenizer
            errors.append(f"the tokenizer in {folder} is not the one that {checkpoint.path} was trained with: prepare that again")
        except UserError as error:
            errors.append(str(error))
    raise UserError("\n".join(errors))


# ---------------------------------------------------------------------------------------------------------------------
# A Hugging Face folder
# ---------------------------------------------------------------------------------------------------------------------


def _of_folder(folder: Path, name: str, needs_weights: bool, block_size: int | None) -> Pretrained:
    config = _read_config(folder)
    model_type, cfg = model_config(config, str(folder / CONFIG), block_size)
    shapes = parameter_shapes(cfg)
    tensors, files = list(layout(READ_AS[model_type], cfg, config)), cache(partial(TensorFolder, folder))
    if needs_weights:
        files().check(tensors)

    def read(parameter: str) -> torch.Tensor:
        import torch

        found = ours_from_theirs(parameter, tensors, files().read)
        return torch.zeros(shapes[parameter]) if found is None else found

    return Pretrained(name, cfg, read, cache(partial(_tokenizer_of_folder, folder, cfg.vocab_size)), is_foreign=True)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is no JSON object")
    return config


def _tokenizer_of_folder(folder: Path, vocab_size: int) -> Tokenizer:
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = open_tokenizer(str(folder))
    elif vocab_size in (GPT2_VOCAB_SIZE, padded_vocab_size(GPT2_VOCAB_SIZE)):
        tokenizer = Gpt2Tokenizer()
    else:
        raise UserError(f"{folder} has no tokenizer.json and no tokenizer.model: put the model's there")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer of {folder} does not match its model: {tokenizer.vocab_size:,} ids for {vocab_size:,} embeddings"
        )
    return tokenizer


def _download(name: str, patterns: Sequence[str]) -> Path:
    """The folder of a model of the hub, in the cache of Hugging Face's libraries, with these files of it. Raises UserError."""
    if name not in GPT2_MODELS and not HUB_NAME.fullmatch(name):
        runs = sorted({path.parent.name for path in Path.cwd().glob(f"out*/{FOLDER}")})
        here = f"runs here: {', '.join(runs)}" if runs else f"the hub has {', '.join(GPT2_MODELS)} and names such as org/model"
        raise UserError(f"{name}: there is no such file or folder; {here}")
    go_offline_without_network()
    import huggingface_hub  # reads at import whether it is offline

    repository = f"openai-community/{name}" if name in GPT2_MODELS else name
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # its own errors, those of its HTTP client, the disk's
        cause = re.split(r"(?<=\.)\s", str(error).strip() or type(error).__name__, maxsplit=1)[0]  # its first sentence
        raise UserError(
            f"{name}: there is no such file or folder, and the Hugging Face hub does not give it. Where there is a network, "
            f"`hf download {repository} --local-dir FOLDER` fetches a folder to name here\n({cause})"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's ckpt.pt
# ---------------------------------------------------------------------------------------------------------------------


def _of_nanogpt(path: Path, data_dir: str) -> Pretrained:
    """Its tensors have the names of transformers' GPT-2, its matrices our layout."""
    saved = _load_nanogpt(path)
    try:
        sizes = {knob: saved["model_args"][knob] for knob in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
        weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        settings, step = saved.get("config") or {}, saved.get("iter_num", 0)
        data = DataConfig(dataset=str(settings.get("dataset", "openwebtext")), data_dir=data_dir)
    except KeyError as error:
        raise UserError(f"{path} is no ckpt.pt of nanoGPT: it has no {error}") from None
    except Exception:  # the values of another file can fail in any way
        raise UserError(f"{path} is no ckpt.pt of nanoGPT: its model_args, model or config hold something else") from None
    cfg = model_of_file(sizes, str(path))
    family = replace(FAMILIES["gpt2"], is_transposed=False)
    tensors = [tensor for tensor in layout(family, cfg, {}) if tensor.source]
    if missing := [each.name for each in tensors if each.name not in shapes]:
        raise UserError(f"{path} lacks {', '.join(missing[:5])}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}")
    if wrong := [f"{each.name} is {shapes[each.name]}, not {each.shape}" for each in tensors if shapes[each.name] != each.shape]:
        raise UserError(f"{path} has tensors of another shape than its model_args: {'; '.join(wrong[:5])}")

    def read(name: str) -> torch.Tensor:
        return ours_from_theirs(name, tensors, weights.__getitem__)

    dataset = Dataset.without_tokens(dataset_folder(data), cfg.vocab_size)
    return Pretrained(f"{path}, step {step}", cfg, read, cache(partial(load_tokenizer, dataset)))


def _load_nanogpt(path: Path) -> Any:
    """What torch.save wrote, read without executing anything of it. Raises UserError."""
    import torch

    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # plain pickles among others, and what PyTorch wrote before 1.6
                raise UserError(f"{path} is not a PyTorch file, or not a whole one")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is no ckpt.pt of nanoGPT: it holds more than tensors and plain values, and nothing of it was executed"
        ) from None
    except RuntimeError:  # another zip file
        raise UserError(f"{path} is not a PyTorch file, or not a whole one") from None
