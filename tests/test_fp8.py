"""FP8 training, emulated: rounding to e4m3 and e5m2, scales, the products' gradients, and whole runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configurator import Config, DataConfig, Fp8Config, ModelConfig, UserError, load_config
from fp8 import E4M3, E5M2, FP8_PRODUCTS, Fp8, Fp8Linear, by_class, choose_fp8, losses_above, scale_of, why_not
from kernels import REFERENCE
from kernels.reference import quantize
from layout import Layout
from model import Transformer, build_model
from parallel import Ranks
from tiny_runs import Runs

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
LAST = torch.tensor([-1])
FINITE, OVERFLOW = torch.zeros(()), torch.ones(())
SHAPE = dict(n_layer=2, n_head=2, n_embd=128, block_size=64, vocab_size=64, d_ff=256, ffn_type="swiglu")
SWIGLU = ("--ffn_type=swiglu", "--bias=False")  # of which FP8 makes one function
FP8 = ("--use_fp8", "--fp8_emulate", *SWIGLU)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    with Runs(tmp_path) as runs:
        yield runs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def no_stats() -> Tensor:
    return torch.zeros(4, dtype=torch.int64)


def table(figures: Tensor, _: list[float]) -> Tensor:
    """One rank's."""
    return figures[None]


def rows_of(model: Transformer) -> dict[Tensor, Tensor]:
    return {p: p for p in model.parameters()}


def build(recipe: str = "delayed", less_memory: bool = False, **knobs: object) -> tuple[Transformer, Fp8]:
    """A model with FP8 products, whose scales have seen one step."""
    cfg = Config(
        model=ModelConfig(**SHAPE | knobs),
        data=DataConfig(batch_size=2, gradient_accumulation_steps=1),
        fp8=Fp8Config(use_fp8=True, fp8_emulate=True, fp8_recipe=recipe, fp8_less_memory=less_memory),
    )
    _, fp8, _ = choose_fp8(cfg, ALONE, torch.float32, REFERENCE)
    model = build_model(cfg.model, CPU, 1, REFERENCE, fp8.convert)
    fp8.attach(CPU, table, rows_of(model))
    backward(model)
    fp8.finish_step(FINITE)
    fp8.begin_step()
    return model, fp8


def backward(model: Transformer) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one batch."""
    ids = torch.randint(64, (2, 2, 64), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    loss = model(*ids)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "largest", "smallest", "digits"), [(E4M3, 448, 2**-9, 3), (E5M2, 57344, 2**-16, 2)], ids=str)
def test_rounding_is_the_formats(dtype: torch.dtype, largest: float, smallest: float, digits: int) -> None:
    """To the nearest, ties to even; beyond the largest that; below half of the smallest 0; what is not finite NaN."""
    one_up = 1 + 2.0**-digits
    tie, above = (1 + one_up) / 2, (1 + one_up) / 2 + 1e-3
    x = torch.tensor([[tie, above, 1e9, -largest * 1.1, largest * 1.03, smallest * 0.6, smallest * 0.4, torch.inf, torch.nan]])
    stats = no_stats()
    rounded = quantize(x, dtype, torch.tensor(1.0), stats)
    want = [1, one_up, largest, -largest, largest, smallest, 0, torch.nan, torch.nan]
    torch.testing.assert_close(rounded.rows[0].float(), torch.tensor(want), rtol=0, atol=0, equal_nan=True)
    assert stats[1:].tolist() == [3, 1, 9]  # infinity is too large as well, and what rounds to the largest is not


@pytest.mark.parametrize("scale", [None, 7.0])
def test_rows_and_columns_are_the_matrix(scale: float | None) -> None:
    x = normal(128, 256) * torch.logspace(-3, 3, 256)
    stats = no_stats()
    rounded = quantize(x, E4M3, None if scale is None else torch.tensor(scale), stats)
    for values, inverse, truth in ((*rounded[:2], x), (*rounded[2:], x.t())):
        if scale is None:
            inverse = inverse.repeat_interleave(128, dim=1)
        inside = truth.abs() < 448 / (scale or 1e-9)
        error = (values.float() * inverse - truth).abs()[inside]
        assert (error <= truth.abs()[inside] * 2**-4 + inverse.max() * 2**-10).all()
    assert stats[:1].to(torch.int32).view(torch.float32) == x.abs().max()


def test_the_scale_of_nothing_or_nonsense() -> None:
    amax = torch.tensor([448.0, 0.0, torch.inf, torch.nan, 1e-45])
    assert scale_of(amax, E4M3, 1, 3.0).tolist() == [0.5, 3.0, 3.0, 3.0, 3.0]


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "knobs"),
    [
        *itertools.product(["delayed", "current", "block"], [{}, {"bias": True}, {"ffn_type": "standard"}]),
        *itertools.product(["delayed", "current"], [{"less_memory": True}]),
    ],
    ids=str,
)
def test_gradients_are_those_of_float32_up_to_rounding(recipe: str, knobs: dict[str, object]) -> None:
    """e4m3 rounds by up to 1/16, e5m2 by up to 1/8: a few per cent of a sum of many. A wrong operand is far off."""
    model, _ = build(recipe, **knobs)
    exact = build_model(model.cfg, CPU, 1)
    (loss, gradients), (true_loss, truth) = backward(model), backward(exact)
    assert loss == pytest.approx(true_loss, rel=3e-3) and loss != true_loss
    for name, got, want in zip(dict(model.named_parameters()), gradients, truth, strict=True):
        assert (got - want).norm() <= 0.15 * want.norm(), name


def test_a_feed_forward_as_one_function_is_its_products_one_by_one() -> None:
    """In float32 nothing is rounded between them, so that the two agree bit for bit."""
    (model, fp8), (other, other_fp8) = build(), build()
    for block in other.blocks:
        block.ffn.forward = lambda x, ffn=block.ffn: ffn.out(ffn.activation(ffn.up(x)))
    (loss, gradients), (other_loss, others) = backward(model), backward(other)
    assert loss == other_loss
    for got, want in zip(gradients, others, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(fp8.linears, other_fp8.linears, strict=True):
        torch.testing.assert_close(mine.own.stats_dy, theirs.own.stats_dy, rtol=1e-5, atol=2)


def test_which_products_run_in_fp8() -> None:
    model, fp8 = build()
    assert {name.split(".", 2)[2] for name, module in model.named_modules() if isinstance(module, Fp8Linear)} == set(FP8_PRODUCTS)
    assert len(fp8.linears) == 8
    assert dict(model.named_parameters()).keys() == dict(Transformer(model.cfg).named_parameters()).keys()


@pytest.mark.parametrize(("recipe", "less_memory"), [("delayed", False), ("current", False), ("block", False), ("delayed", True)])
def test_recomputing_a_block_changes_nothing(recipe: str, less_memory: bool) -> None:
    plain, recomputed = build(recipe, less_memory), build(recipe, less_memory, gradient_checkpointing=True)
    for (loss, gradients), (other_loss, others) in [(backward(plain[0]), backward(recomputed[0]))]:
        assert loss == other_loss and all(map(torch.equal, gradients, others))
    plain[1].finish_step(FINITE), recomputed[1].finish_step(FINITE)
    assert torch.equal(plain[1].history, recomputed[1].history)


def test_less_memory() -> None:
    """A weight has no transpose between its uses, which changes nothing; what SwiGLU keeps is rounded, which does."""
    (plain, fp8), (less, less_fp8) = build(), build(less_memory=True)
    for block in less.blocks:  # as two products
        block.ffn.forward = lambda x, ffn=block.ffn: ffn.out(ffn.activation(ffn.up(x)))
    for block in plain.blocks:
        block.ffn.forward = lambda x, ffn=block.ffn: ffn.out(ffn.activation(ffn.up(x)))
    assert all(linear.own.copies.columns.numel() == 0 for linear in less_fp8.linears)
    less.load_state_dict(plain.state_dict())
    for name in ("scale_x", "scale_dy"):  # of one step, whose gradients were not the same
        torch._foreach_copy_([getattr(x.own, name) for x in less_fp8.linears], [getattr(x.own, name) for x in fp8.linears])
    (loss, gradients), (other_loss, others) = backward(plain), backward(less)
    assert loss == other_loss and all(map(torch.equal, gradients, others))
    kept = []
    whole, rounded = build()[0], build(less_memory=True)[0]
    for model in (whole, rounded):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            backward(model)
    half = len(kept) // 2
    assert sum(kept[half:]) < 0.9 * sum(kept[:half])


def test_weights_are_rounded_once_a_step() -> None:
    model, fp8 = build()
    for _ in range(3):  # micro-steps
        backward(model)
    linear = fp8.linears[0]
    assert linear.own.stats_w[3] == linear.weight.numel() and linear.own.stats_x[3] == 3 * 2 * 64 * 128


def test_evaluation_is_in_full_precision() -> None:
    model, _ = build()
    exact, ids = build_model(model.cfg, CPU, 1).eval(), torch.randint(64, (1, 7))  # no multiple of 16
    assert torch.equal(model.eval()(ids), exact(ids))


def test_where_masters_are_rounded_a_matrix_is_only_there_for_its_gradient() -> None:
    cfg = Config(model=ModelConfig(**SHAPE), fp8=Fp8Config(use_fp8=True, fp8_emulate=True))
    _, fp8, _ = choose_fp8(cfg, ALONE, torch.bfloat16, REFERENCE)
    model, exact = (build_model(cfg.model, CPU, 1, REFERENCE, change) for change in (fp8.convert, lambda model: model))
    layout = Layout(ALONE, cfg.parallel, torch.bfloat16)
    layout.attach(model)
    fp8.attach(CPU, table, layout.rows)
    layout.begin(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        backward(model)
        ids = torch.randint(64, (1, 7))
        assert torch.equal(model.eval()(ids), exact.eval()(ids))
    for linear in fp8.linears:
        gradient, of_wide = linear.weight.grad, normal(*linear.weight.shape)
        assert linear.weight.untyped_storage().nbytes() == 2
        assert gradient.dtype == torch.bfloat16 and gradient.is_contiguous() and gradient.count_nonzero() > 0
        rounded = fp8.arithmetic.round_weight(of_wide, linear.own._replace(copies=None))
        again = fp8.arithmetic.round_weight(of_wide.bfloat16(), linear.own._replace(copies=None))
        assert torch.equal(rounded.rows.float(), again.rows.float())
    assert layout.rounded == {}


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_zero1_is_ddp_bit_for_bit(runs: Runs, micro_steps: int) -> None:
    flags = (*FP8, "--dtype=bfloat16", "--max_iters=4", f"--gradient_accumulation_steps={2 * micro_steps}")
    for strategy in ("ddp", "zero1"):
        runs.run_ranks(2, strategy, *flags, f"--parallel={strategy}")
    ddp, zero1 = fp8_tensors(runs, "ddp"), fp8_tensors(runs, "zero1")
    assert ddp.keys() == zero1.keys() and [name for name in ddp if not torch.equal(ddp[name], zero1[name])] == []


@pytest.mark.parametrize("less_memory", [False, True])
def test_compiled_products_count_and_round_as_plain_ones(less_memory: bool) -> None:
    model, fp8 = build(less_memory=less_memory, n_layer=1)
    ffn, linear = model.blocks[0].ffn, fp8.linears[0]
    x = normal(32, 128).requires_grad_()

    def both(x: Tensor) -> Tensor:
        return ffn(x).sum() + linear(x).square().sum()

    outcomes = []
    for call in (both, torch.compile(both, fullgraph=True)):
        fp8.begin_step()
        model.zero_grad()
        x.grad = None
        loss = call(x)
        loss.backward()
        gradients = [x.grad, linear.weight.grad, ffn.up.weight.grad, ffn.out.weight.grad]
        stats = [stats.clone() for layer in (linear, ffn.up, ffn.out) for stats in (layer.own.stats_x, layer.own.stats_dy)]
        outcomes.append([loss.detach(), *gradients, *stats])
    for plain, compiled in zip(*outcomes, strict=True):  # what is compiled keeps more digits, and so rounds to others
        assert (compiled - plain).float().norm() <= 0.02 * plain.float().norm()
        assert compiled.dtype != torch.int64 or compiled[3] == plain[3]  # values that were counted


# ---------------------------------------------------------------------------------------------------------------------
# Scales and statistics
# ---------------------------------------------------------------------------------------------------------------------


def test_delayed_scales_follow_the_largest_of_the_last_steps() -> None:
    cfg = Fp8Config(use_fp8=True, fp8_history=2, fp8_margin=1)
    _, fp8 = build()
    fp8.cfg = cfg
    fp8.history = torch.zeros(2, len(fp8.linears), 3)
    own, scales = fp8.linears[0].own, []
    for amax in (4.0, 2.0, 1.0, torch.nan, 1e30, 0.0, 0.0):
        for stats in (own.stats_x, own.stats_w, own.stats_dy):
            stats[0] = torch.tensor(amax).view(torch.int32).long()
        fp8.finish_step(FINITE if amax < 1e30 else OVERFLOW)
        scales.append((own.scale_x.item(), own.scale_w.item(), own.scale_dy.item()))
    x, w, dy = zip(*scales, strict=True)
    first_x, first_dy = fp8.first_scales
    assert x == (448 / 2 / 4, 448 / 2 / 4, *[448 / 2 / 2] * 3, 448 / 2 / 1, first_x)  # steps that are skipped change nothing
    assert w == (*x[:6], x[5])  # of nothing it stays, until it is measured
    assert dy == (*(57344 / 448 * scale for scale in x[:6]), first_dy)


def test_the_first_gradients_are_of_a_ranks_micro_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "all_of", lambda ranks, value: [value] * ranks.world_size)
    scales = []
    for n_ranks in (1, 4):
        cfg = Config(
            model=ModelConfig(**SHAPE),
            data=DataConfig(batch_size=2, gradient_accumulation_steps=8),
            fp8=Fp8Config(use_fp8=True, fp8_emulate=True),
        )
        _, fp8, _ = choose_fp8(cfg, Ranks(0, n_ranks, CPU), torch.float32, REFERENCE)
        model = build_model(cfg.model, CPU, 1, REFERENCE, fp8.convert)
        fp8.attach(CPU, table, rows_of(model))
        scales.append(fp8.linears[0].own.scale_dy.item())
    assert scales[0] == 4 * scales[1] == fp8.first_scales[1] * 8


def test_a_history_of_another_form_is_told() -> None:
    _, fp8 = build()
    newest = torch.rand(2, *fp8.history.shape[1:])
    assert fp8.take(newest) == [] and torch.equal(fp8.history[:2], newest)
    (line,) = fp8.take(torch.rand(16, len(fp8.linears), 2))
    assert "start afresh" in line and torch.equal(fp8.history[:2], newest)


def test_weights_that_were_read_are_measured() -> None:
    """At first, and where they are not what the history has seen."""
    linear = (fp8 := build()[1]).linears[0]
    largest = linear.weight.abs().max()
    assert linear.own.scale_w == 448 / largest == 448 / fp8.history[0, 0, 1]
    with torch.no_grad():
        linear.weight.mul_(2)
    fp8.history.zero_()
    fp8.restore()
    assert linear.own.scale_w == 448 / (2 * largest)
    fp8.history[3, 0, 1] = 7.0
    fp8.restore()
    assert linear.own.scale_w == 448 / 7


def test_ranks_share_what_they_measured() -> None:
    """The largest value of all, and the sums of what was lost and of what there was."""
    histories, losses = [], []
    for n, of_all in ((1, table), (2, lambda figures, _: torch.stack([figures, 2 * figures]))):
        model, fp8 = build()
        fp8.attach(CPU, of_all, rows_of(model))
        backward(model)
        fp8.linears[0].own.stats_x[1:] = torch.tensor([30, 50, 100])
        losses.append((n, fp8.finish_step(FINITE)))
        histories.append(fp8.history[0])
    assert torch.equal(2 * histories[0], histories[1]) and histories[0].all()
    assert torch.allclose(losses[0][1], losses[1][1]) and losses[0][1][0].all()  # 3 a of 3 b


def test_counts_of_ranks_add_up() -> None:
    model, fp8 = build()
    fp8.attach(
        CPU, lambda figures, _: torch.stack([figures, torch.zeros_like(figures).index_fill_(0, LAST, 1e9)]), rows_of(model)
    )
    backward(model)
    alone = torch.stack(fp8.statistics()).view(-1, 3, 4)[:, 2].sum(0)  # of gradients: amax, too large, 0, all
    assert fp8.finish_step(FINITE)[2, 1] == pytest.approx((alone[2] / (alone[3] + 1e9)).item()) and alone[2] > 0


def test_shares_are_named_and_warned_of() -> None:
    figures = by_class([0.02, 0.0, 0.0, 0.5, 0.0, 0.0])
    assert figures["activations"] == {"saturated_percent": 2.0, "flushed_percent": 0.0}
    assert losses_above(figures, 1.0) == {
        "activations.saturated_percent": "2.00 % of the activations were too large for FP8",
        "weights.flushed_percent": "50.00 % of the weights became 0 in FP8",
    }
    assert by_class([]) == {} and losses_above({}, 0.0) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Where it cannot run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), "a CPU has no FP8 products; --fp8_emulate"),
        (("--fp8_emulate", "--n_embd=24", "--n_head=2"), "n_embd=24, the width of qkv=72: must be a multiple of 16"),
        (("--fp8_emulate", "--n_embd=64", "--n_head=2", "--fp8_recipe=block"), "must be a multiple of 128"),
        (("--fp8_emulate", "--batch_size=1", "--block_size=24"), "batch_size x block_size=24"),
    ],
    ids=str,
)
def test_why_not(flags: tuple[str, ...], reason: str) -> None:
    given = ["--use_fp8", "--n_embd=64", "--n_head=2", "--block_size=64", "--device=cpu", *flags]
    cfg, fp8, lines = choose_fp8(load_config(given), ALONE, torch.bfloat16, REFERENCE)
    assert not fp8.active and not cfg.fp8.use_fp8
    assert "FP8 is left out, and products run in bfloat16" in lines[0] and reason in lines[0]
    with pytest.raises(UserError, match="--fp8_required"):
        choose_fp8(load_config([*given, "--fp8_required"]), ALONE, torch.bfloat16, REFERENCE)


def test_ranks_of_which_one_cannot_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(["--use_fp8", "--fp8_emulate", "--n_embd=64", "--n_head=2", "--block_size=64"])
    monkeypatch.setattr(Ranks, "all_of", lambda ranks, value: [value, "its GPU is too old"])
    chosen, fp8, (line,) = choose_fp8(cfg, Ranks(0, 2, CPU), torch.bfloat16, REFERENCE)
    assert not fp8.active and not chosen.fp8.use_fp8 and line.endswith("its GPU is too old")


@pytest.mark.parametrize(
    ("capability", "cuda", "runs_in", "reason"),
    [
        ((8, 0), "13.0", "", "is older than Ada and Hopper"),
        ((8, 9), "13.0", "delayed current", "need Hopper and CUDA 12.9"),
        ((9, 0), "12.8", "delayed current", "need Hopper and CUDA 12.9"),
        ((9, 0), "12.9", "delayed current block", ""),
        ((10, 0), "13.0", "delayed current", "need Hopper and CUDA 12.9"),
    ],
    ids=str,
)
def test_gpus(capability: tuple[int, int], cuda: str, runs_in: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for recipe in ("delayed", "current", "block"):
        cfg = load_config(["--use_fp8", "--n_embd=128", "--n_head=2", "--block_size=128", f"--fp8_recipe={recipe}"])
        answer = why_not(cfg, torch.device("cuda"), torch.bfloat16)
        assert (answer is None) == (recipe in runs_in.split()) and reason in (answer or reason)


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--fp8_required", "pass --use_fp8 as well"),
        ("--fp8_less_memory", "pass --use_fp8 as well"),
        ("--use_fp8 --dtype=float16", "pass --dtype=bfloat16"),
        ("--use_fp8 --fp8_recipe=delayd", "did you mean delayed"),
        ("--use_fp8 --fp8_recipe=block --fp8_less_memory", "pass --fp8_recipe=delayed"),
    ],
)
def test_impossible_flags(flags: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        load_config(flags.split())


def test_a_run_says_why_and_goes_on(runs: Runs) -> None:
    output = runs.run("out", "--use_fp8", "--fp8_less_memory", "--fp8_recipe=current", "--fp8_history=4", "--max_iters=2")
    assert "FP8 is left out, and products run in float32: a CPU has no" in output and "note: --fp8" not in output
    config = runs.log("out")["config"]
    for knob in ("use_fp8", "fp8_less_memory"):
        assert (config["values"][knob], config["origins"][knob]) == (False, "left out")
    assert load_config([f"--{knob}={value}" for knob, value in config["values"].items() if knob.startswith("fp8")])
    assert "error: --fp8_required: a CPU has no" in runs.run("b", "--use_fp8", "--fp8_required", exit_code=2)
    assert set(runs.tiers("out")) == {"latest"} and not (runs.folder / "b").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_learns_what_float32_learns_and_reports(runs: Runs) -> None:
    output = runs.run("fp8", *FP8, "--max_iters=40", "--eval_interval=20", "--eval_iters=2")
    runs.run("exact", *SWIGLU, "--max_iters=40")
    losses, exact = runs.losses("fp8"), runs.losses("exact")
    assert losses[40] < 0.75 * losses[1] and losses[40] == pytest.approx(exact[40], rel=0.05) and losses != exact
    assert "FP8 in attention.qkv, attention.out, ffn.up, ffn.out of each block, delayed scaling, emulated" in output
    log = runs.log("fp8")
    assert log["startup_info"]["training"]["precision"].startswith("fp8 products in the blocks (delayed scaling)")
    shares = log["training_iterations"][-1]["fp8"]
    assert set(shares) == {"activations", "weights", "gradients"} and 0 <= shares["weights"]["flushed_percent"] < 1
    assert "fp8" not in runs.log("exact")["training_iterations"][0]


def test_micro_batches_only_share_the_work(runs: Runs) -> None:
    """All micro-steps have the same scales."""
    runs.run("two", *FP8, "--max_iters=3")
    runs.run("one", *FP8, "--max_iters=3", "--batch_size=8", "--gradient_accumulation_steps=1")
    assert runs.losses("two")[1] == pytest.approx(runs.losses("one")[1], rel=1e-5)
    assert runs.losses("two")[3] == pytest.approx(runs.losses("one")[3], rel=2e-3)


def test_a_warning_is_told_until_it_has_fallen_again(runs: Runs) -> None:
    """Of each class and kind by itself."""
    flags = ("--max_iters=12", "--fp8_warn_percent=0.01", "--learning_rate=3e-2", "--warmup_iters=0", "--log_interval=1")
    output = runs.run("out", *FP8, *flags)
    told, before, n_silent = [], set(), 0
    for record in runs.log("out")["training_iterations"]:
        above = losses_above(record["fp8"], 0.01)
        if new := [text for what, text in above.items() if what not in before]:
            told.append(f"warning: at step {record['iter']} {', '.join(new)}")
        n_silent += len(above) > len(new)
        before = set(above)
    assert [line for line in output.splitlines() if line.startswith("warning: at step")] == told
    assert len(told) > 1 and n_silent > 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--dropout=0.1",),
        ("--gradient_checkpointing", "--fp8_recipe=current"),
        ("--fp8_less_memory", "--dtype=bfloat16"),
        ("--fp8_recipe=block", "--n_embd=128", "--block_size=32"),
    ],
    ids=str,
)
def test_stopped_and_resumed_bit_for_bit(runs: Runs, flags: tuple[str, ...]) -> None:
    flags = (
        *FP8,
        *flags,
        "--eval_interval=4",
        "--eval_iters=1",
        "--sample_interval=5",
        "--sample_tokens=3",
        "--sample_prompt=the",
    )
    runs.run("whole", *flags, "--max_iters=12")
    runs.run("parts", *flags, "--max_iters=5")
    runs.run("parts", *flags, "--max_iters=12", "--resume=latest")
    whole, parts = (fp8_tensors(runs, name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert runs.losses("whole") == runs.losses("parts")
    assert ("fp8.amax_history" in whole) == ("--fp8_recipe" not in "".join(flags))


def fp8_tensors(runs: Runs, out_dir: str) -> dict[str, Tensor]:
    checkpoint = runs.checkpoint(out_dir)
    assert checkpoint.path.parent.name == "checkpoints_fp8"
    return checkpoint.read_tensors(checkpoint.metadata.state_dict_metadata)


def test_a_run_goes_from_one_precision_to_the_other(runs: Runs) -> None:
    """Each saves in its own folder, and `latest` is the newest of both; a history of another length starts afresh."""
    runs.run("out", *SWIGLU, "--max_iters=3")
    assert "checkpoints/latest after step 3" in runs.run("out", *FP8, "--max_iters=6", "--resume=latest")
    longer = runs.run("out", *FP8, "--fp8_history=4", "--max_iters=7", "--resume=latest")
    assert runs.tensors("out")["fp8.amax_history"][:, 0, 0].count_nonzero() == 4  # the newest three of sixteen, and one more
    assert "checkpoints_fp8/latest after step 6" in longer
    assert "checkpoints_fp8/latest after step 7" in runs.run("out", *SWIGLU, "--max_iters=9", "--resume=latest")
    assert runs.checkpoint("out").path.parent.name == "checkpoints" and runs.checkpoint("out").iter == 9
    assert list(runs.losses("out")) == list(range(1, 10))
    moved = runs.run("out", *SWIGLU, "--max_iters=1")
    assert "checkpoints." in moved and "checkpoints_fp8." in moved and not (runs.folder / "out" / "checkpoints_fp8").exists()


def test_gradients_fit_their_scale_whatever_the_number_of_ranks(runs: Runs) -> None:
    """A rank's loss is divided by its micro-steps: the fewer it has, the larger its gradients are."""
    flags = (*FP8, "--gradient_accumulation_steps=8", "--log_interval=1")
    runs.run("out", *flags, "--max_iters=6")
    runs.run_ranks(4, "out", *flags, "--max_iters=7", "--resume=latest")
    shares = [record["fp8"]["gradients"]["saturated_percent"] for record in runs.log("out")["training_iterations"]]
    assert shares[6] <= max(shares[1:6]) + 0.01
    assert runs.losses("out")[7] < runs.losses("out")[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "parallel",
    [
        "--parallel=ddp",
        "--parallel=zero1",
        "--parallel=fsdp --fsdp_accumulate_whole",  # weights stay gathered behind an evaluation
        "--parallel=fsdp --fsdp_accumulate_whole=False --fsdp_reshard_after_forward=False",
        "--parallel=fsdp",
        "--parallel=zero1 --fp8_less_memory",
        "--parallel=fsdp --fp8_less_memory",
        "--parallel=fsdp --fsdp_reshard_after_forward=False --fp8_less_memory",
    ],
)
def test_two_ranks_train_as_one(runs: Runs, parallel: str, dtype: str) -> None:
    """The ranks agree on scales, so one set is in the checkpoint."""
    flags = (*FP8, "--max_iters=4", "--fsdp_min_num_params=1", "--gradient_accumulation_steps=4", "--eval_interval=1")
    output = runs.run_ranks(2, "two", *flags, *parallel.split(), f"--dtype={dtype}")
    assert "UserWarning" not in output
    runs.run("one", *flags, f"--dtype={dtype}", f"--fp8_less_memory={'less' in parallel}")
    one, two = runs.losses("one"), runs.losses("two")
    assert two[1] == pytest.approx(one[1], rel=1e-5 if dtype == "float32" else 1e-3) and two[4] == pytest.approx(one[4], rel=5e-3)
    alone, shared = (fp8_tensors(runs, name)["fp8.amax_history"][0] for name in ("one", "two"))  # of the last step
    torch.testing.assert_close(shared[:, :2], alone[:, :2], rtol=0.05, atol=0)
    torch.testing.assert_close(shared[:, 2], alone[:, 2], rtol=0.5, atol=0)  # whose micro-steps are twice as many


def test_the_config_of_a_run_without_fp8_does_nothing() -> None:
    cfg, fp8, lines = choose_fp8(Config(), ALONE, torch.float32, REFERENCE)
    model = Transformer(dataclasses.replace(ModelConfig(**SHAPE)))
    assert cfg == Config() and lines == []
    assert fp8.convert(model) is model and fp8.tensors() == {} and len(fp8.finish_step(FINITE)) == 0
