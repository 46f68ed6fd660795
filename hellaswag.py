"""HellaSwag: which of four endings does a model find most likely? `python hellaswag.py --out_dir=out`; `--help` lists the knobs.

10,042 items of the validation set (Zellers et al. 2019). The score of an ending is the log-likelihood of its tokens behind the
context: `acc` takes the highest, `acc_norm` the highest divided by the characters of the ending. Texts are cleaned and tokens cut
as EleutherAI's lm-evaluation-harness does it, and the numbers are the same (benchmarks/hellaswag_agreement.py). For OpenAI's
GPT-2 124 M llm.c quotes the harness with acc 0.2892 and acc_norm 0.3114, for GPT-2 1.56 B with 0.4004 and 0.5089.

The four endings of an item share its context, which is computed once: contexts of the same length go through the model together,
and their keys and values serve the endings. Under torchrun the ranks share the items out.
"""

from __future__ import annotations

import sys

from configurator import HellaswagConfig, KernelConfig, ParallelConfig, RunConfig, answer_early, load_section, run_command

if __name__ == "__main__":  # before torch, which takes seconds to import
    answer_early(lambda argv: load_section(argv, HellaswagConfig))

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import kernels
from configurator import ROOT, UserError
from data.source import download_once
from data.tokenizer import Tokenizer
from model import KVCache, Transformer
from parallel import Ranks, ending_together, start_ranks
from precision import choose_dtype, dtype_name
from pretrained import Pretrained, load_model, open_pretrained

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
DOWNLOADED = ROOT / "data" / "hellaswag" / "hellaswag_val.jsonl"
# cuDNN plans every new shape for 50 ms, and there are hundreds.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BATCH_POSITIONS = 8192  # whose logits are there at a time: 1.6 GB in float32 with GPT-2's vocabulary


def main(argv: list[str]) -> int:
    cfg = load_section(argv, HellaswagConfig)
    with ExitStack() as stack, ending_together(lambda error: error):
        ranks = start_ranks(RunConfig(device=cfg.device), ParallelConfig(), stack)
        items = ranks.agree(lambda: read_items(find_source(cfg.source, "--source")))[: cfg.limit or None]
        source = open_pretrained(cfg.out_dir if cfg.init_from == "resume" else cfg.init_from, cfg.checkpoint, cfg.data_dir)
        questions = tokenize(items, source.load_tokenizer(), source.cfg.block_size, prefix_of(source))
        ops, _ = kernels.choose(vars(KernelConfig()), ranks.device.type)
        dtype = choose_dtype(cfg.dtype, ranks.device)
        t0_s = time.perf_counter()
        scores = log_likelihoods(load_model(source, ranks.device, dtype, ops), questions, ranks)
        assert scores is not None, "nothing stops it"
        if ranks.is_main:
            print(f"{source.name}, {dtype_name(dtype)}: {score_of(scores, questions)}")
            print(f"{time.perf_counter() - t0_s:.1f} s on {ranks.world_size} x {ranks.device.type}", file=sys.stderr)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Items
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    context: str
    endings: list[str]
    label: int  # of the right one


def find_source(source: str, flag: str = "--hellaswag_source") -> Path:
    """The file that holds the items; without a name the validation set, downloaded once. Raises UserError naming the flag."""
    if not source:
        return download_once(URL, DOWNLOADED, flag)
    if not Path(source).is_file():
        raise UserError(f"{flag}={source}: there is no such file")
    return Path(source)


def read_items(path: Path) -> list[Item]:
    """The items of a file as HellaSwag publishes them, one JSON object a line. Raises UserError naming the line."""
    items = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                items.append(parse_item(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not items:
        raise UserError(f"{path} has no items")
    return items


def parse_item(line: str, where: str) -> Item:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    texts = ("activity_label", "ctx_a", "ctx_b")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in texts):
        raise UserError(f"{where}: no item of HellaSwag: it needs the texts {', '.join(texts)}")
    endings, label = entry.get("endings"), entry.get("label")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and clean(e) for e in endings):
        raise UserError(f"{where}: endings must be a list of texts, four as a rule")
    if not str(label).isdecimal() or int(label) >= len(endings):
        raise UserError(f"{where}: label={label!r} does not name one of the {len(endings)} endings (the test set has no labels)")
    context = f"{entry['activity_label']}: {entry['ctx_a']} {entry['ctx_b'].capitalize()}"
    return Item(clean(context), [clean(ending) for ending in endings], int(label))


def clean(text: str) -> str:
    """Without the marks that WikiHow has left, such as [title] and [step]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


@dataclass(frozen=True)
class Question:
    """One context and endings behind it, in tokens."""

    item: int
    first: int  # number of the first of these endings among the item's
    context: list[int]
    endings: list[list[int]]


@dataclass(frozen=True)
class Questions:
    all: list[Question]
    labels: np.ndarray  # (items,)
    n_characters: list[list[int]]  # of each ending of each item


def prefix_of(source: Pretrained) -> list[int]:
    """What a text begins with for a model that others have trained, such as LLaMA's <s>; empty for ours."""
    if not source.is_foreign:
        return []
    return source.encode_prompt("a")[: -len(source.load_tokenizer().encode("a"))]


def tokenize(items: Sequence[Item], tokenizer: Tokenizer, block_size: int, prefix: Sequence[int] = ()) -> Questions:
    """The tokens of an ending are those of context and ending together, less as many as the context has alone.

    The prefix comes before every context. What does not fit into block_size loses the start of its context, and then each ending
    has a question of its own. Raises UserError for an ending that does not fit by itself.
    """
    contexts = tokenizer.encode_batch([item.context.rstrip() for item in items])  # blanks belong to what follows
    wholes = iter(tokenizer.encode_batch([f"{item.context} {ending}" for item in items for ending in item.endings]))
    questions = []
    for number, (item, ids) in enumerate(zip(items, contexts, strict=True)):
        context, endings = [*prefix, *ids.tolist()], [next(wholes)[len(ids) :].tolist() for _ in item.endings]
        longest = max(map(len, endings))
        if longest > block_size:
            raise UserError(f"an ending of item {number + 1} has {longest} tokens, and the model a context of {block_size}")
        if len(context) + longest - 1 <= block_size:
            questions.append(Question(number, 0, context, endings))
        else:
            cut = [context[-(block_size + 1 - len(ending)) :] for ending in endings]
            questions += [Question(number, i, cut[i], [ending]) for i, ending in enumerate(endings)]
    labels, n_characters = np.array([item.label for item in items]), [[len(e) for e in item.endings] for item in items]
    return Questions(questions, labels, n_characters)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    items: int
    acc: float
    acc_norm: float

    def __str__(self) -> str:
        return f"{self.items:,} items of HellaSwag: acc {self.acc:.4f}, acc_norm {self.acc_norm:.4f}"


def score_of(scores: np.ndarray, questions: Questions) -> Score:
    """scores (items, endings) as log_likelihoods gives them."""
    chosen = []
    for row, lengths in zip(scores, questions.n_characters, strict=True):
        found = row[: len(lengths)]
        chosen.append([int(np.argmax(found)), int(np.argmax(found / lengths))])
    acc, acc_norm = (np.array(chosen) == questions.labels[:, None]).mean(axis=0)
    return Score(len(chosen), float(acc), float(acc_norm))


@torch.no_grad()
def log_likelihoods(
    model: Transformer,
    questions: Questions,
    ranks: Ranks,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    is_stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """Of every ending of every item, (items, endings) float64, shared out over the ranks and the same on all of them.

    What an item has no ending for stays 0. `precision` gives the context of a batch: autocast, where the weights are not of the
    dtype that the model computes in. None where `is_stopped`, which all ranks ask before every batch.
    """
    n_items, n_endings = len(questions.n_characters), max(map(len, questions.n_characters))
    scores = torch.zeros(n_items, n_endings, dtype=torch.float64, device=ranks.device)
    batches = make_batches(questions.all)
    own = range(ranks.rank, -(-len(batches) // ranks.world_size) * ranks.world_size, ranks.world_size)
    was_training = model.training
    model.eval()
    try:
        for number in tqdm(own, "HellaSwag", delay=2, leave=False, disable=None if ranks.is_main else True):
            if is_stopped():
                return None
            # Sharded parameters are gathered by all ranks together: one that has no batch left computes the last one again.
            batch = batches[min(number, len(batches) - 1)]
            with precision(), sdpa_kernel(WITHOUT_PLANS):
                found = score_batch(model, batch, ranks.device)
            if number < len(batches):
                places = torch.tensor([[question.item, question.first] for question in batch], device=ranks.device)
                columns = places[:, 1:] + torch.arange(found.shape[1], device=ranks.device)
                scores[places[:, :1], columns] = found.double()
    finally:
        model.train(was_training)
    ranks.sum_(scores)
    ranks.finish_device()
    return scores.cpu().numpy()


def make_batches(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions whose contexts are equally long and which have as many endings, as many as BATCH_POSITIONS allow."""
    alike = defaultdict(list)
    for question in questions:
        alike[len(question.context), len(question.endings)].append(question)
    batches = []
    for group in alike.values():
        group.sort(key=lambda question: max(map(len, question.endings)))  # little padding
        batch: list[Question] = []
        for question in group:
            if (len(batch) + 1) * len(question.endings) * max(map(len, question.endings)) > BATCH_POSITIONS and batch:
                batches.append(batch)
                batch = []
            batch.append(question)
        batches.append(batch)
    return batches


def score_batch(model: Transformer, batch: list[Question], device: torch.device) -> Tensor:
    """Log-likelihood of each ending: B questions of E endings -> (B, E) float32 on the device.

    Legend: Tc tokens of a context, Te tokens of the longest ending.
    """
    contexts = torch.tensor([question.context for question in batch], device=device)  # (B, Tc)
    endings = [ending for question in batch for ending in question.endings]
    longest = max(map(len, endings))
    padded = [ending + [-1] * (longest - len(ending)) for ending in endings]
    targets = torch.tensor(padded, device=device)  # (B E, Te); -1 behind a shorter one
    B, E = len(batch), len(batch[0].endings)
    cache = KVCache(model.cfg, contexts.shape[1] + longest - 1)
    logits = model(contexts, cache=cache, last_only=True).repeat_interleave(E, dim=0)  # (B E, 1, V)
    total = token_log_likelihoods(logits, targets[:, :1])
    if longest > 1:
        cache.repeat(E)
        logits = model(targets[:, :-1].clamp(min=0), cache=cache)  # (B E, Te - 1, V)
        total += token_log_likelihoods(logits, targets[:, 1:])
    return total.view(B, E)


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over the targets that are not -1: logits (N, T, V), targets (N, T) -> (N,) float32."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    return -losses.view(targets.shape).sum(dim=1)


if __name__ == "__main__":
    run_command(main)
