"""How Hugging Face's `transformers` writes a model: config.json, names and layouts of its tensors, safetensors files.

FAMILIES is the table of its architectures that our components make up, read in both directions. Nothing here needs
`transformers` itself, and tensors pass one at a time: memory holds the largest of them, not the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configurator import Given, ModelConfig, UserError, convert, knobs_of, model_of_file

if TYPE_CHECKING:
    import torch

Bias = bool | str  # whether a module of theirs has a bias, or the field of config.json that says so
Module = tuple[str, Bias]  # their name; of several, one behind the other in ours, with blanks between. {i} is the layer

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu", "relu_squared": "relu2"}
READ_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")  # tables that old folders hold, no weights
CONFIG = "config.json"
TENSORS = "model.safetensors"  # of a model in one file
INDEX = "model.safetensors.index.json"  # of one in several


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    class_name: str  # in config.json's `architectures`
    parts: dict[str, tuple[Any, ...]]  # knob -> the values that it can express; the first is what its folders are read as
    fields: dict[str, str]  # config.json's field -> our knob or property of the same value
    defaults: dict[str, Any]  # fields that a config.json may leave out
    fixed: dict[str, Any]  # fields that have this value or are absent
    modules: dict[str, Module]
    is_transposed: bool = False  # matrices of the blocks are (in, out), where ours are (out, in)


LAYER_NORMS, STANDARD = ("layernorm", "layernorm_nobias"), {"ffn_type": ("standard",), "activation": tuple(ACTIVATIONS)}
GPT2 = Family(
    class_name="GPT2LMHeadModel",
    parts={
        **{"normalization": LAYER_NORMS, "norm_position": ("pre",), "position_encoding": ("learned_absolute",), **STANDARD},
        **{"bias": (True, False), "qk_norm": (False,), "n_kv_head": (0,)},
    },
    fields={
        **{"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_inner": "ffn_hidden", "n_positions": "block_size"},
        **{"vocab_size": "vocab_size", "layer_norm_epsilon": "norm_eps", "activation_function": "activation"},
        **{"tie_word_embeddings": "weight_tying", "resid_pdrop": "dropout"},
    },
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True},
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    modules={
        "token_embedding": ("transformer.wte", False),
        "position_embedding": ("transformer.wpe", False),
        "attention_norm": ("transformer.h.{i}.ln_1", True),
        "attention.qkv": ("transformer.h.{i}.attn.c_attn", True),
        "attention.out": ("transformer.h.{i}.attn.c_proj", True),
        "ffn_norm": ("transformer.h.{i}.ln_2", True),
        "ffn.up": ("transformer.h.{i}.mlp.c_fc", True),
        "ffn.out": ("transformer.h.{i}.mlp.c_proj", True),
        "final_norm": ("transformer.ln_f", True),
        "head": ("lm_head", False),
    },
    is_transposed=True,
)
LLAMA = Family(
    class_name="LlamaForCausalLM",
    parts={
        **{"normalization": ("rmsnorm",), "norm_position": ("pre",), "position_encoding": ("rope",), "ffn_type": ("swiglu",)},
        **{"bias": (False, True), "qk_norm": (False,)},
    },
    fields={
        **{"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": "kv_heads"},
        **{"hidden_size": "n_embd", "intermediate_size": "ffn_hidden", "max_position_embeddings": "block_size"},
        **{"vocab_size": "vocab_size", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta", "head_dim": "head_dim"},
        **{"tie_word_embeddings": "weight_tying", "attention_bias": "bias", "mlp_bias": "bias"},
    },
    defaults={
        **{"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
        **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    },
    fixed={"hidden_act": "silu", "sliding_window": None},
    modules={
        "token_embedding": ("model.embed_tokens", False),
        "attention_norm": ("model.layers.{i}.input_layernorm", False),
        "attention.qkv": (" ".join(f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"), "attention_bias"),
        "attention.out": ("model.layers.{i}.self_attn.o_proj", "attention_bias"),
        "ffn_norm": ("model.layers.{i}.post_attention_layernorm", False),
        "ffn.up": ("model.layers.{i}.mlp.gate_proj model.layers.{i}.mlp.up_proj", "mlp_bias"),
        "ffn.out": ("model.layers.{i}.mlp.down_proj", "mlp_bias"),
        "final_norm": ("model.norm", False),
        "head": ("lm_head", False),
    },
)
QWEN3 = replace(  # LLaMA whose queries and keys are normed
    LLAMA,
    class_name="Qwen3ForCausalLM",
    parts=LLAMA.parts | {"qk_norm": (True,), "bias": (False,)},
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    modules=LLAMA.modules
    | {
        "attention.q_norm": ("model.layers.{i}.self_attn.q_norm", False),
        "attention.k_norm": ("model.layers.{i}.self_attn.k_norm", False),
    },
)
STARCODER2 = replace(  # LayerNorm, RoPE and a feed-forward of two matrices
    LLAMA,
    class_name="Starcoder2ForCausalLM",
    parts=LLAMA.parts | {"normalization": LAYER_NORMS, "bias": (True, False), **STANDARD},
    fields={
        **{ours: knob for ours, knob in LLAMA.fields.items() if ours not in ("rms_norm_eps", "attention_bias", "mlp_bias")},
        **{"norm_epsilon": "norm_eps", "hidden_act": "activation", "use_bias": "bias"},
    },
    defaults=LLAMA.defaults
    | {"norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh", "use_bias": True, "tie_word_embeddings": True},
    fixed={"sliding_window": None},
    modules=LLAMA.modules
    | {
        **{norm: (LLAMA.modules[norm][0], True) for norm in ("attention_norm", "ffn_norm", "final_norm")},
        **{name: (LLAMA.modules[name][0], "use_bias") for name in ("attention.qkv", "attention.out")},
        "ffn.up": ("model.layers.{i}.mlp.c_fc", "use_bias"),
        "ffn.out": ("model.layers.{i}.mlp.c_proj", "use_bias"),
    },
)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "starcoder2": STARCODER2}  # by config.json's model_type
QWEN2 = replace(  # LLaMA with biases on queries, keys and values
    LLAMA,
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    modules=LLAMA.modules | {"attention.qkv": (LLAMA.modules["attention.qkv"][0], True)},
)
READ_AS = FAMILIES | {"mistral": LLAMA, "qwen2": QWEN2}  # what is read and not written


# ---------------------------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------------------------


def model_type_of(cfg: ModelConfig) -> str:
    """The architecture of transformers that `cfg` is. Raises UserError naming the components that none has."""
    values = vars(cfg) | {"n_kv_head": 0 if cfg.kv_heads == cfg.n_head else cfg.n_kv_head}
    lacking = {
        model_type: [f"{knob}={values[knob]}" for knob, allowed in family.parts.items() if values[knob] not in allowed]
        for model_type, family in FAMILIES.items()
    }
    nearest = min(lacking, key=lambda model_type: len(lacking[model_type]))
    if lacking[nearest]:
        raise UserError(
            f"transformers has no architecture for {cfg.architecture}: the nearest, {nearest}, lacks "
            + ", ".join(lacking[nearest])
        )
    return nearest


def config_json(cfg: ModelConfig) -> dict[str, Any]:
    """config.json of a model, without the ids of special tokens. Raises UserError where transformers has no such model."""
    model_type = model_type_of(cfg)
    family = FAMILIES[model_type]
    values = {field: getattr(cfg, knob) for field, knob in family.fields.items()}
    values = {field: ACTIVATIONS[value] if family.fields[field] == "activation" else value for field, value in values.items()}
    if family is GPT2:
        values |= {"embd_pdrop": cfg.dropout, "attn_pdrop": cfg.dropout}
    return {"architectures": [family.class_name], "model_type": model_type, **family.fixed, **values}


def model_config(config: dict[str, Any], where: str, block_size: int | None = None) -> tuple[str, ModelConfig]:
    """(model_type, knobs) of a config.json. Raises UserError naming what cannot be, or what our components do not make up.

    `block_size` is the context that will be used of it, where that is not all: a sliding window may be as short as that.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in READ_AS:
        raise UserError(f"{where}: model_type={model_type!r} is not one of {', '.join(READ_AS)}")
    family = READ_AS[model_type]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the newer and the older place
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {rope!r} is not an object with the parameters of the rotary positions")
    given = family.defaults | {"rope_theta": rope.get("rope_theta", family.defaults.get("rope_theta"))} | config
    knobs = read_fields(family, given, where)
    context, window = min(knobs["block_size"], block_size or knobs["block_size"]), given.get("sliding_window")
    if type(window) is int and window >= context:  # a token sees itself and the window - 1 before it: all of them
        given["sliding_window"] = None
    wrong = [f"{field}={given[field]!r}" for field, value in family.fixed.items() if given.get(field, value) != value]
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        wrong.append(f"rope scaling {rope.get('rope_type', rope.get('type'))!r}")
    knobs["bias"] = any(given[bias] if isinstance(bias, str) else bias for _, bias in family.modules.values())
    knobs["n_kv_head"], knobs["d_ff"] = knobs.pop("kv_heads", 0), knobs.pop("ffn_hidden", 0)
    head_dim = knobs["n_embd"] // knobs["n_head"]
    if knobs.pop("head_dim", head_dim) != head_dim:
        wrong.append(f"head_dim={given['head_dim']}, where n_embd/n_head is {head_dim}")
    if "activation" in knobs:
        theirs = knobs["activation"]
        knobs["activation"] = READ_ACTIVATIONS.get(theirs)
        wrong += [] if theirs in READ_ACTIVATIONS else [f"activation {theirs!r}"]
    if wrong:
        raise UserError(f"{where}: our components do not make up a model with {', '.join(wrong)}")
    fixed = {knob: allowed[0] for knob, allowed in family.parts.items() if knob not in (*knobs, "activation")}
    return model_type, model_of_file(fixed | knobs | {"dropout": 0.0}, where)


def read_fields(family: Family, given: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a config.json, each of its knob's type and by its name; without those that it leaves to a default of null.

    Raises UserError naming those that are missing or cannot be.
    """
    if missing := [field for field in family.fields if field not in given and field != "resid_pdrop"]:
        raise UserError(f"{where} does not say {', '.join(missing)}")
    knobs, values, problems = knobs_of({"model": ModelConfig}), {}, []
    for field, name in family.fields.items():
        if field not in given or (given[field] is None and family.defaults.get(field, "") is None):
            continue
        kind = knobs.get(name, knobs["n_layer"])  # properties of ModelConfig that are no knobs are sizes too
        if name == "activation":
            kind = replace(kind, type=str, default="gelu_new")
        try:
            values[name] = convert(replace(kind, name=field), Given(field, given[field], where, is_text=False))
            if kind.type is int and values[name] < 1:
                raise ValueError(f"{field}={values[name]} must be greater than 0")
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Names and layouts of tensors
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TheirTensor:
    """One tensor of theirs, and where it is in ours."""

    name: str
    shape: tuple[int, ...]
    source: str | None  # our parameter; None where ours has no such bias: zeros
    first_row: int  # of our parameter: several of theirs may be one of ours
    is_transposed: bool


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model, in its order."""
    import torch

    from model import Transformer

    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(cfg).named_parameters()}


def layout(family: Family, cfg: ModelConfig, config: dict[str, Any]) -> Iterator[TheirTensor]:
    """All tensors of a folder whose config.json is `config`, in the order of ours."""
    shapes, given = parameter_shapes(cfg), family.defaults | config
    for name in [name for name in shapes if name.endswith(".weight")]:
        path = name.removesuffix(".weight")
        layer, _, module = path.removeprefix("blocks.").partition(".") if path.startswith("blocks.") else ("", "", path)
        theirs, bias = family.modules[module]
        parts = theirs.replace("{i}", layer).split(" ")
        rows = {"attention.qkv": [cfg.n_head * cfg.head_dim, *2 * [cfg.kv_heads * cfg.head_dim]], "ffn.up": 2 * [cfg.ffn_hidden]}
        sizes = rows[module] if len(parts) > 1 else [shapes[name][0]]
        transposes = family.is_transposed and bool(layer) and len(shapes[name]) == 2
        first = 0
        for part, size in zip(parts, sizes, strict=True):
            shape = (size, *shapes[name][1:])
            yield TheirTensor(f"{part}.weight", shape[::-1] if transposes else shape, name, first, transposes)
            if given[bias] if isinstance(bias, str) else bias:
                yield TheirTensor(f"{part}.bias", (size,), f"{path}.bias" if f"{path}.bias" in shapes else None, first, False)
            first += size


def theirs_from_ours(tensor: TheirTensor, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Their tensor, out of our parameters as `read` gives them by name."""
    import torch

    if tensor.source is None:
        return torch.zeros(tensor.shape)
    ours = read(tensor.source)
    return ours.T if tensor.is_transposed else ours[tensor.first_row : tensor.first_row + tensor.shape[0]]


def ours_from_theirs(name: str, tensors: Iterable[TheirTensor], read: Callable[[str], torch.Tensor]) -> torch.Tensor | None:
    """Our parameter, out of their tensors as `read` gives them by name; None for a bias that theirs has not."""
    import torch

    parts = [read(each.name).T if each.is_transposed else read(each.name) for each in tensors if each.source == name]
    return torch.cat(parts) if parts else None


# ---------------------------------------------------------------------------------------------------------------------
# safetensors files: 8 bytes with the length of a JSON header, the header, the tensors
# ---------------------------------------------------------------------------------------------------------------------


def write_tensors(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], torch.Tensor], shard_bytes: int
) -> None:
    """Writes model.safetensors, or as many files of at most `shard_bytes` (one tensor at least) as it takes, and their index.

    `read` is called once for each name of `shapes`, in their order. Raises OSError.
    """
    import torch

    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, n_bytes in sizes.items():
        if shards[-1] and sum(sizes[each] for each in shards[-1]) + n_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    stem, files = TENSORS.partition(".")[0], [TENSORS]
    if len(shards) > 1:
        files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    for file_name, names in zip(files, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            header[name] = {"dtype": code, "shape": shapes[name], "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        text = json.dumps(header).encode()
        text = text.ljust(-(-len(text) // 8) * 8)  # the data starts at a multiple of 8
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(read(name).to(dtype).contiguous().view(torch.uint8).numpy().data)


class TensorFolder:
    """The tensors of a folder, in one safetensors file or several. Raises UserError where one is missing or torn."""

    def __init__(self, folder: Path) -> None:
        import safetensors

        self.folder = folder
        files = [TENSORS] if (folder / TENSORS).exists() else self._files_of_index()
        self._file_of: dict[str, Any] = {}  # open safetensors file by tensor
        for name in files:
            try:
                file = safetensors.safe_open(folder / name, framework="pt")
                self._file_of |= dict.fromkeys(file.keys(), file)
            except FileNotFoundError:
                raise UserError(f"{folder}: {name} is missing; copy or download it again") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{folder / name} is damaged: {error}; copy or download it again") from None

    def _files_of_index(self) -> list[str]:
        try:
            return sorted(set(json.loads((self.folder / INDEX).read_bytes())["weight_map"].values()))
        except FileNotFoundError:
            raise UserError(f"{self.folder} has no {TENSORS} and no {INDEX}: only safetensors are read") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{self.folder / INDEX} is damaged: {error}") from None

    def check(self, expected: Iterable[TheirTensor]) -> None:
        """Compares names and shapes with what config.json promises. Raises UserError naming what differs."""
        wanted = {self.find(tensor.name): list(tensor.shape) for tensor in expected}
        ignored = "" if "lm_head.weight" in wanted else "lm_head.weight"  # a tied head, written twice
        there = {name: file.get_slice(name).get_shape() for name, file in self._file_of.items()}
        there = {name: shape for name, shape in there.items() if name in wanted or not (BUFFERS.search(name) or name == ignored)}
        names = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
        if names:
            lines = [f"  {name}: {there.get(name, 'missing')}, not {wanted.get(name, 'in this model')}" for name in names[:10]]
            more = [f"  and {len(names) - 10} more"] if len(names) > 10 else []
            raise UserError("\n".join([f"the tensors of {self.folder} are not those of its {CONFIG}:", *lines, *more]))

    def find(self, name: str) -> str:
        """The name under which it is there: folders of the bare decoder leave its first part out."""
        short = name.partition(".")[2]
        return short if name not in self._file_of and short in self._file_of else name

    def read(self, name: str) -> torch.Tensor:
        name = self.find(name)
        return self._file_of[name].get_tensor(name)
