"""micro_step.py: what is replayed is what would have been called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from configurator import load_config
from layout import Layout
from micro_step import GraphedMicroStep, MicroStep
from model import build_model
from optim import build_optimizer, update
from parallel import Ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
BATCHES = [torch.randint(16, (2, 4, 8), generator=torch.Generator().manual_seed(i)) for i in range(6)]  # idx, targets (4, 8)


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 32), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)).cuda()


def plain(net: nn.Module) -> MicroStep:
    def micro_step(idx: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(net(idx).flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach()

    return micro_step


def steps(micro_step: MicroStep, net: nn.Module, accumulation: int) -> list[Tensor]:
    """Losses and gradients of steps of so many micro-steps; gradients are dropped between steps and weights move."""
    seen = []
    for first in range(0, len(BATCHES), accumulation):
        for batch in BATCHES[first : first + accumulation]:
            seen.append(micro_step(*batch.cuda()).clone())
        seen += [p.grad.clone() for p in net.parameters()]
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
        net.zero_grad(set_to_none=True)
    return seen


@pytest.mark.parametrize("accumulation", (1, 2, 3))
def test_equals_the_micro_step_itself(accumulation: int) -> None:
    a, b = network(), network()
    warm_up = plain(b)
    warm_up(*BATCHES[0].cuda())
    b.zero_grad(set_to_none=True)
    expected = steps(plain(a), a, accumulation)
    torch.testing.assert_close(steps(GraphedMicroStep(warm_up, b.parameters()), b, accumulation), expected)


def test_every_replay_draws_its_own_dropout() -> None:
    net = network(dropout=0.5)
    micro_step = plain(net)
    micro_step(*BATCHES[0].cuda())
    net.zero_grad(set_to_none=True)
    graphed = GraphedMicroStep(micro_step, net.parameters())
    losses = []
    for _ in range(4):
        losses.append(graphed(*BATCHES[0].cuda()).item())
        net.zero_grad(set_to_none=True)
    assert len(set(losses)) == 4


def test_a_graph_recorded_later_goes_on_with_the_same_random_numbers() -> None:
    """What a resumed run does: new graphs, and the random state of the run before."""
    losses, states = [], []
    for _ in range(2):
        net = network(dropout=0.5)
        micro_step = plain(net)
        micro_step(*BATCHES[0].cuda())
        net.zero_grad(set_to_none=True)
        graphed = GraphedMicroStep(micro_step, net.parameters())
        torch.cuda.set_rng_state(states[2]) if states else torch.cuda.manual_seed(1)
        for batch in BATCHES[2 if states else 0 : 4]:
            states.append(torch.cuda.get_rng_state())
            losses.append(graphed(*batch.cuda()).item())
            net.zero_grad(set_to_none=True)
    assert losses[4:] == losses[2:4]


@pytest.mark.parametrize("micro_steps", (1, 3))
def test_rounded_weights_and_their_sums(micro_steps: int) -> None:
    """As a run has it: some steps of a model whose blocks' matrices have masters, bitwise as without a graph."""
    device, seen = torch.device("cuda"), []
    cfg = load_config(["config/quickstart.py", "--n_layer=2", "--vocab_size=64", "--block_size=32", "--dtype=bfloat16"])
    for graphed in (False, True):
        ops = kernels.choose(vars(cfg.kernels), "cuda")[0]
        model = build_model(cfg.model, device, 0, ops)
        layout = Layout(Ranks(0, 1, device), cfg.parallel, torch.bfloat16)
        layout.attach(model)
        optimizer = build_optimizer(layout.rows.values(), cfg.optim, ops.AdamW, layout.rounded)

        def plain(idx: Tensor, targets: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(idx, targets)
            loss.backward()
            return loss.detach()

        batches = torch.randint(64, (9, 2, 4, 32), generator=torch.Generator().manual_seed(0)).cuda()
        plain(*batches[0])
        model.zero_grad(set_to_none=True)
        micro_step = GraphedMicroStep(plain, model.parameters()) if graphed else plain
        for number, batch in enumerate(batches[: 9 // micro_steps * micro_steps]):
            layout.begin(number % micro_steps + 1, micro_steps)
            seen.append(micro_step(*batch).clone())
            if number % micro_steps + 1 == micro_steps:
                update(optimizer, cfg.optim, 1e-3, torch.ones((), device=device), False, layout.gradients())
                layout.finish()
        seen += [part.rows.detach().clone() for part in layout.parts.values()]
    half = len(seen) // 2
    assert all(map(torch.equal, seen[:half], seen[half:]))
