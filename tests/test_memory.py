"""Predicted memory against what torch.compile's partitioner keeps for the backward pass, and against measured peaks."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

import exchange
import kernels
from configurator import ROOT, load_config
from exchange import PIECE, RING_PIECES, Copies
from flops import PEAKS, count_parameters
from layout import Layout
from memory import (
    GPU_MEMORY_GIB,
    LOGITS_BYTES,
    RING_BYTES,
    USABLE,
    bytes_of,
    exchanges_behind,
    first_that_fits,
    head_copy,
    kept_per_token,
    loss_bytes,
    predict_memory,
    ring_bytes,
    rounded_elements,
    settled,
    unit_parameters,
)
from model import Transformer
from parallel import Ranks
from precision import DTYPES, autocast
from sharding import DataParallelBehind

GIB = 2**30
LLAMA = ["config/full_llama_1.36b.py"]
GPT2 = ["config/train_gpt2.py", "--vocab_size=50304"]
ONE_MICRO_STEP = "--gradient_accumulation_steps=1"
TORCH_LOSS = [ONE_MICRO_STEP, "--cross_entropy_kernel=torch"]
TINY = ["--n_layer=3", "--n_embd=48", "--n_head=3", "--vocab_size=211", "--block_size=16", "--batch_size=2"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def kept_bytes(argv: list[str], who: str) -> int:
    """Bytes of all tensors, but the parameters, that the compiled forward pass hands to the backward pass."""
    cfg = load_config(argv)
    ops = kernels.triton_kernels() if who == "triton" else kernels.REFERENCE
    sizes: dict[int, int] = {}

    def partition(graph, inputs, num_fwd_outputs, **options):
        halves = min_cut_rematerialization_partition(
            graph, inputs, compiler="inductor", num_fwd_outputs=num_fwd_outputs, **options
        )
        outputs = next(node for node in halves[0].graph.nodes if node.op == "output").args[0]
        for node in outputs[num_fwd_outputs:]:
            value = node.meta["val"] if hasattr(node, "meta") and node.op != "placeholder" else None
            if isinstance(value, Tensor) and value.is_floating_point():  # no states of random number generators
                sizes[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()  # views share theirs
        return halves

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    idx = torch.zeros(cfg.data.batch_size, cfg.model.block_size, dtype=torch.int64)
    model, ranks, dtype = Transformer(cfg.model, ops), Ranks(0, 1, torch.device("cpu")), DTYPES[cfg.run.dtype]
    Layout(ranks, cfg.parallel, dtype).attach(model)
    with autocast(ranks.device, dtype):
        torch.compile(model, backend=backend)(idx, idx)
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("who", "argv"),
    [
        ("torch", [*LLAMA, *TINY, "--d_ff=132"]),
        pytest.param("triton", [*LLAMA, *TINY, "--d_ff=132"], marks=needs_triton),
        pytest.param("triton", [*LLAMA, *TINY, "--d_ff=132", "--n_kv_head=1", "--qk_norm"], marks=needs_triton),
        pytest.param("triton", [*LLAMA, *TINY, "--d_ff=132", "--gradient_checkpointing"], marks=needs_triton),
        ("torch", [*LLAMA, *TINY, "--d_ff=132", "--dtype=float32"]),
        ("torch", [*GPT2, *TINY]),
        pytest.param("triton", [*GPT2, *TINY], marks=needs_triton),
        ("torch", [*GPT2, *TINY, "--norm_position=post", "--bias", "--position_encoding=none", "--activation=relu"]),
    ],
    ids=["llama_torch", "llama_triton", "gqa_qk_norm", "checkpointed", "float32", "gpt2", "gpt2_triton", "post_norm_biases"],
)
@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
def test_kept_bytes_are_what_the_partitioner_keeps(who, argv):
    argv = [f"--rope_kernel={who}", f"--cross_entropy_kernel={who}", "--dtype=bfloat16", *argv]
    cfg = load_config(argv)
    tokens, dtype = cfg.data.batch_size * cfg.model.block_size, cfg.run.dtype
    expected = tokens * kept_per_token(cfg, dtype) + loss_bytes(cfg, dtype)[0]
    if who == "torch":  # with the kernel the head's copy ends with the forward pass
        expected += head_copy(cfg.model, bytes_of(dtype))
    assert kept_bytes(argv, who) == pytest.approx(expected, abs=16)  # the loss's own scalars


@pytest.mark.parametrize(
    ("argv", "measured_gib"),
    [
        ([*LLAMA, *TORCH_LOSS, "--rope_kernel=torch"], 40.9),
        ([*LLAMA, *TORCH_LOSS], 38.33),
        ([*GPT2, *TORCH_LOSS, "--batch_size=32"], 13.97),
    ],
    ids=["llama_torch", "llama_triton", "gpt2"],
)
def test_peak_equals_the_measured_one(argv, measured_gib):
    """On one H200 (docs/RESULTS.md); the must is 15 %."""
    assert predict_memory(load_config(argv), "bfloat16").peak / GIB == pytest.approx(measured_gib, rel=0.02)


@pytest.mark.parametrize(
    ("argv", "measured_gib"),
    [(LLAMA, 39.15), (["config/full_gpt2_1.36b.py"], 42.84), ([*GPT2, "--batch_size=32"], 12.73)],
    ids=["llama", "gpt2_1.4b", "gpt2"],
)
def test_peak_with_the_kernels_of_auto_is_nearly_what_is_reserved(argv, measured_gib):
    """On one H200 (docs/TRAINING_GUIDE.md), with the allocator's gaps."""
    assert predict_memory(load_config([*argv, ONE_MICRO_STEP]), "bfloat16").peak / GIB == pytest.approx(measured_gib, rel=0.03)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("ddp", {"everywhere": True}), ("zero1", {"everywhere": False}), ("fsdp", {"everywhere": False, "gathers": True})],
    ids=["ddp", "zero1", "fsdp"],
)
def test_the_ring_is_the_exchanges(strategy, options, refused):
    with pytest.raises(RuntimeError):
        Copies(Ranks(0, 4, torch.device("cpu")), largest_share=2**30, add=kernels.REFERENCE.average_, **options)
    assert refused == [ring_bytes(load_config(LLAMA), strategy, 4)]
    assert RING_BYTES == RING_PIECES * PIECE


def test_the_ring_of_replayed_micro_steps_is_for_all_gradients_at_once(refused):
    cfg = load_config(["config/train_shakespeare_char.py", "--vocab_size=65"])
    layout = DataParallelBehind(Ranks(0, 4, torch.device("cpu")), cfg.parallel, torch.bfloat16, "copies")
    with torch.device("meta"):
        layout.model = Transformer(cfg.model, kernels.REFERENCE)
    with pytest.raises(RuntimeError):
        layout.share(list(layout.model.parameters()))
    assert refused == [pytest.approx(ring_bytes(cfg, "ddp", 4), rel=1e-3)]


@pytest.fixture
def refused(monkeypatch) -> list[int]:
    """Bytes that an exchange has asked for, in vain."""
    asked = []

    def refuse(ranks: Ranks, n_bytes: int) -> None:
        asked.append(n_bytes)
        raise RuntimeError

    monkeypatch.setattr(exchange, "PeerMemory", refuse)
    return asked


def test_rows_of_logits_that_are_held():
    from kernels.cross_entropy import CHUNK_BYTES

    assert LOGITS_BYTES == CHUNK_BYTES
    few, many = (load_config([*GPT2, "--batch_size=32", f"--loss_chunk_rows={rows}"]) for rows in (1024, 0))
    vocab_size, rows = few.model.vocab_size, 32 * 1024 // 2  # two chunks of less than 2 GiB
    assert loss_bytes(many, "bfloat16")[1] - loss_bytes(few, "bfloat16")[1] == 2 * (rows - 1024) * vocab_size


@pytest.mark.parametrize("ranks", [2, 8])
def test_what_is_sharded(ranks):
    cfg = load_config(LLAMA)
    n, matrices = count_parameters(cfg.model).total, rounded_elements(cfg.model, 2)
    ddp, zero1, fsdp = (predict_memory(cfg, "bfloat16", name, ranks) for name in ("ddp", "zero1", "fsdp"))
    own = 4 * (n - matrices) + 4 * matrices // ranks  # embeddings and head have no masters
    assert (ddp.parameters, ddp.gradients, ddp.optimizer) == (4 * n, 4 * n, 8 * n)
    assert (zero1.parameters, zero1.gradients, zero1.optimizer) == (own, 4 * n, 8 * n // ranks)
    assert (fsdp.parameters, fsdp.gradients, fsdp.optimizer) == (4 * n // ranks, 4 * n // ranks, 8 * n // ranks)
    assert ddp.peak - zero1.peak == 4 * n - own + 8 * n - 8 * n // ranks + 2 * RING_BYTES
    assert fsdp.peak < zero1.peak
    copies = load_config([*LLAMA, f"--hsdp_shard_size={ranks}"])
    assert predict_memory(copies, "bfloat16", "fsdp", 16).parameters == fsdp.parameters


@pytest.mark.parametrize(
    ("size", "at_the_end"), [([], False), (["--batch_size=1", "--block_size=128"], True)], ids=["activations", "gradients"]
)
def test_zero1_with_one_micro_step_has_masters_and_averages_of_its_own_rows(size, at_the_end):
    """At the peak are activations of many tokens, which are the same, or else gradients."""
    cfg = load_config([*LLAMA, *size, "--gradient_accumulation_steps=4"])
    n, matrices = count_parameters(cfg.model).total, rounded_elements(cfg.model, 2)
    ddp, zero1 = (predict_memory(cfg, "bfloat16", name, 4) for name in ("ddp", "zero1"))
    others = 4 * matrices * 3 // 4
    assert ddp.parameters - zero1.parameters == ddp.gradients - zero1.gradients == others
    assert ddp.peak - zero1.peak == others + others * at_the_end + 8 * n * 3 // 4 + 2 * RING_BYTES


def test_gradients_are_as_narrow_as_products_until_they_are_summed_or_averaged():
    def use(strategy: str, ranks: int, *knobs: str, dtype: str = "bfloat16"):
        return predict_memory(load_config([*LLAMA, *knobs]), dtype, strategy, ranks).gradients

    m, single = load_config(LLAMA).model, "--gradient_accumulation_steps=4"
    n, matrices = count_parameters(m).total, rounded_elements(m, 2)
    assert use("ddp", 1, ONE_MICRO_STEP) == 4 * n - 2 * matrices
    assert use("ddp", 1) == use("zero1", 4) == use("ddp", 4) == use("ddp", 4, single) == 4 * n
    assert use("zero1", 4, single) < use("zero1", 4, single, "--exchange=collectives") == 4 * n
    assert use("ddp", 1, ONE_MICRO_STEP, dtype="float32") == use("zero1", 4, single, dtype="float32") == 4 * n


def test_what_is_on_its_way_to_the_gradients():
    """In the products' dtype a whole model's, or a block's where a collective makes averages of them at once."""
    cfg = load_config([*LLAMA, "--batch_size=1", "--block_size=128", "--gradient_accumulation_steps=4"])
    n, matrices = count_parameters(cfg.model).total, rounded_elements(cfg.model, 2)
    held = 4 * n + 2 * matrices + 8 * n + 4 * n  # parameters, the rounded ones, AdamW, gradients
    alone, among = (predict_memory(cfg, "bfloat16", "ddp", ranks).peak for ranks in (1, 4))
    assert alone == held + 4 * n - 2 * matrices
    assert among == held + 2 * matrices + 5 * RING_BYTES  # kept until they have been sent
    through_nccl = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, exchange="collectives"))
    assert predict_memory(through_nccl, "bfloat16", "ddp", 4).peak == held + 2 * unit_parameters(cfg.model)


MEDIUM = "--n_layer=24 --n_embd=1024 --n_head=16"


@pytest.mark.parametrize(
    ("flags", "strategy", "behind"),
    [
        ("", "ddp", True),
        ("", "zero1", False),
        ("--cuda_graph=False", "ddp", False),
        ("--compile=False", "ddp", False),
        (MEDIUM, "ddp", False),
        (f"{MEDIUM} --cuda_graph", "ddp", True),
    ],
)
def test_whose_micro_steps_are_replayed_among_ranks(flags, strategy, behind):
    assert exchanges_behind(load_config([*GPT2, *flags.split()]), strategy) == behind


@pytest.mark.parametrize("size", [[], ["--batch_size=1", "--block_size=128"]], ids=["activations", "gradients"])
@pytest.mark.parametrize("micro_steps", [1, 4])
def test_ranks_that_replay_micro_steps_hold_what_one_process_does_and_what_they_exchange(micro_steps, size):
    """Gradients as they were made or added up, copied; and where those are narrow their averages, which are float32."""
    alone, ranks = (
        load_config([*LLAMA, *size, "--cuda_graph", f"--gradient_accumulation_steps={n * micro_steps}"]) for n in (1, 4)
    )
    n, matrices = count_parameters(alone.model).total, rounded_elements(alone.model, 2)
    more = predict_memory(ranks, "bfloat16", "ddp", 4).peak - predict_memory(alone, "bfloat16", "ddp", 1).peak
    copied = 4 * n if micro_steps > 1 else 4 * (n - matrices) + 2 * matrices
    assert more == copied + (4 * matrices if micro_steps == 1 else 0) + 5 * RING_BYTES


@pytest.mark.parametrize(("strategy", "second_copy"), [("ddp", 0), ("zero1", 2), ("fsdp", 0)])
def test_fp8_copies_are_bfloat16s(strategy, second_copy):
    cfg, with_fp8 = (load_config([*LLAMA, *more]) for more in ([], ["--use_fp8"]))
    use, more = (predict_memory(c, "bfloat16", strategy, 4) for c in (cfg, with_fp8))
    assert more.peak - use.peak == more.weight_copies - use.weight_copies == second_copy * rounded_elements(cfg.model, 2)
    assert (more.parameters, more.gradients) == (use.parameters, use.gradients)


@pytest.mark.parametrize("knobs", [[], ["--gradient_checkpointing"], ["--bias", "--weight_tying"]])
def test_weights_in_the_products_dtype_are_the_blocks_linears_and_the_heads(knobs):
    cfg = load_config([*LLAMA, *TINY, *knobs])
    model, ranks = Transformer(cfg.model), Ranks(0, 1, torch.device("cpu"))
    layout = Layout(ranks, cfg.parallel, torch.bfloat16)
    layout.attach(model)
    rounded = sum(p.numel() for p in layout.rounded.values())
    assert rounded == rounded_elements(cfg.model, 2) == sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert predict_memory(cfg, "bfloat16").weight_copies == 2 * (rounded + cfg.model.vocab_size * cfg.model.n_embd)


def test_fsdp_that_keeps_its_weights_gathered_needs_them_all():
    knobs = ([], ["--fsdp_reshard_after_forward=False"], ["--fsdp_min_num_params=1e9"])
    resharded, kept, one_unit = (predict_memory(load_config([*LLAMA, *more]), "bfloat16", "fsdp", 8) for more in knobs)
    whole = 2 * count_parameters(load_config(LLAMA).model).total
    assert resharded.weight_copies < kept.weight_copies == one_unit.weight_copies == whole


def test_fsdp_may_exchange_once_a_step():
    def use(*knobs: str):
        return predict_memory(load_config([*LLAMA, *knobs]), "bfloat16", "fsdp", 8)

    n, reduced, whole = count_parameters(load_config(LLAMA).model).total, use(), use("--fsdp_accumulate_whole")
    assert whole.gradients - reduced.gradients == 4 * n and whole.weight_copies == 2 * n
    assert whole.peak - reduced.peak == 4 * n + whole.weight_copies - reduced.weight_copies
    # With one micro-step a rank nothing is added up.
    assert use("--fsdp_accumulate_whole", "--gradient_accumulation_steps=8").gradients == reduced.gradients


def test_what_fsdp_holds_is_what_there_is_room_for():
    def held(memory_gib: float, *knobs: str) -> tuple[bool | None, bool | None]:
        parallel = settled(load_config([*LLAMA, *knobs]), "bfloat16", 8, memory_gib).parallel
        return parallel.fsdp_accumulate_whole, parallel.fsdp_reshard_after_forward

    def needed_gib(*knobs: str) -> float:
        return predict_memory(load_config([*LLAMA, *knobs]), "bfloat16", "fsdp", 8).peak / GIB / USABLE

    one, keep, whole = "--gradient_accumulation_steps=8", "--fsdp_reshard_after_forward=False", "--fsdp_accumulate_whole"
    assert needed_gib(one) < needed_gib(one, keep) and needed_gib() < needed_gib(keep) < needed_gib(whole)
    assert held(140) == (True, False) and held(1) == held(0, one) == (False, True)
    assert held(1.001 * needed_gib(one, keep), one) == (False, False)
    assert held(0.999 * needed_gib(one, keep), one) == (False, True)
    assert held(0.999 * needed_gib(whole)) == (False, False)  # room for the weights, but not for the sums
    assert held(140, "--fsdp_accumulate_whole=False", "--fsdp_reshard_after_forward") == (False, True)
    assert held(1, whole, keep) == (True, False) and held(140, whole, one) == (False, False)


@pytest.mark.parametrize(("memory_gib", "strategy"), [(140, "ddp"), (44, "zero1"), (31, "fsdp"), (23, None)])
def test_the_first_that_fits(memory_gib, strategy):
    """LLAMA's peaks among 4 ranks: 43.7, 33.1 and 27.4 GiB, of which 92 % of the memory must be enough."""
    assert first_that_fits(load_config(LLAMA), "bfloat16", 4, memory_gib) == strategy


@pytest.mark.parametrize(("memory_gib", "strategy"), [(48, "ddp"), (46, None)])
def test_one_gpu_has_nobody_to_share_with(memory_gib, strategy):
    """92 % of 46 GiB would do for fsdp, which needs fewer copies, but there is nothing to shard."""
    assert first_that_fits(load_config(LLAMA), "bfloat16", 1, memory_gib) == strategy


def test_gradients_of_an_earlier_micro_step_are_there_too():
    one, more = (predict_memory(load_config([*LLAMA, knob]), "bfloat16") for knob in (ONE_MICRO_STEP, "--batch_size=8"))
    assert more.peak - one.peak == more.gradients


def test_every_known_gpu_has_a_memory():
    assert GPU_MEMORY_GIB.keys() == {name for gpu in PEAKS for name in gpu.device_names}


def test_memory_needs_no_torch():
    subprocess.run([sys.executable, "-c", "import memory, sys; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
