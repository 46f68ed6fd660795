"""What every prepare.py shares: documents in, `train.bin` and `val.bin` out, restartable, in little memory, on all cores.

Documents arrive in pieces (data/source.py); batches of pieces are tokenised by a pool of threads (every tokenizer here
lets other threads run) and appended, in order, to files in `parts/`. Every few seconds `parts/journal.json` records how
far they go: after a crash or a kill the same command cuts the files back to the journal and goes on. Only whole files are
moved into the dataset's folder, so what is there can be trained on.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import UserError
from data.source import PIECE_CHARS, Document, Source, Split, local_source
from data.tokenizer import CharacterTokenizer, Tokenizer, open_tokenizer, train_bpe
from data.tokens import DTYPES, SPLITS, Manifest, SplitManifest

FORMAT = 1  # counts up whenever the same source and options give other files
BPE_SAMPLE_CHARS = 16 << 20  # of the train split, to train a tokenizer on
MAX_BPE_ENTRIES = 1 << 27  # the library reserves memory for all of them beforehand
USUAL_CONTEXT = 256  # of the small presets; a smaller val.bin is of little use
JOURNAL_INTERVAL_S = 5.0  # work that a kill can cost
HASH_BYTES = 1 << 20
DATASET_FILES = ("train.bin", "val.bin", "manifest.json", "meta.pkl", "tokenizer.json", "tokenizer.model")

SOURCE_HELP = "a file or folder in place of the download: text, .jsonl or .parquet with a field text, also as .gz or .zst"
TOKENIZER_HELP = (
    "gpt2, characters, bpe:N (trained on the source), a tokenizer.json, a SentencePiece .model, a folder with one, or a hub name"
)
VAL_FRACTION_HELP = "share of the documents that is for validation; of the characters, if the source is one single text file"


@dataclass(frozen=True)
class Recipe:
    """What one prepare.py names: its folder, and the defaults of its flags."""

    folder: Path
    tokenizer: str  # gpt2, characters, bpe:N, a path or a hub name
    val_fraction: float  # of the documents; of the characters, where the source is one single text file
    source: Callable[[Path, float], Source]  # (folder, val_fraction); not called when --source is given
    full_source: Callable[[Path, float], Source] | None = None  # what --full takes


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    split: Split
    first: bool
    last: bool


@dataclass
class Progress:
    """What is in one split's file so far."""

    tokens: int = 0
    bytes: int = 0  # of text
    documents: int = 0

    def add(self, other: Progress) -> None:
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.documents += other.documents


@dataclass
class Journal:
    """How far a preparation has come; on disk it never runs ahead of the files it speaks of."""

    digest: str  # the job's
    documents: int = 0  # done, of both splits
    pieces: int = 0  # done, of the next document
    moved: str | None = None  # key of the document that goes to the other split, which would be empty without it
    splits: dict[str, Progress] = field(default_factory=lambda: {split: Progress() for split in SPLITS})

    @classmethod
    def read(cls, path: Path, digest: str) -> Journal:
        """The journal at `path`, or an empty one where that is missing, torn or another job's."""
        try:
            journal = cls(**json.loads(path.read_text(encoding="utf-8")))
            journal.splits = {split: Progress(**journal.splits[split]) for split in SPLITS}
        except (OSError, ValueError, TypeError, KeyError):
            return cls(digest)
        return journal if journal.digest == digest else cls(digest)


@dataclass(frozen=True)
class Job:
    """One preparation: where from, how, where to."""

    source: Source
    tokenizer: Tokenizer
    val_fraction: float
    limit: int | None
    num_proc: int
    out: Path

    @property
    def parts(self) -> Path:
        return self.out / "parts"

    @property
    def dtype(self) -> str:
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def digest(self) -> str:
        """Of all that decides what the files hold; the number of threads does not."""
        tokenizer = (self.tokenizer.hash, self.tokenizer.eot_id)
        made_from = (FORMAT, self.source.identity(), tokenizer, self.val_fraction, self.limit)
        return hashlib.sha256(repr(made_from).encode()).hexdigest()


def prepare(recipe: Recipe, argv: list[str]) -> int:
    """Runs a prepare.py: see `--help`. Returns the exit code; raises UserError."""
    args = _parse(recipe, argv)
    out = args.out.resolve()
    try:
        with _made(out), _only_one(out):
            job = _plan(recipe, args, out)
            if _is_prepared(job):
                print(f"{out} is prepared already")
                return 0
            journal = _resume(job)
            _tokenize(job, journal)
            if not all(progress.tokens for progress in journal.splits.values()):
                journal = Journal(job.digest(), moved=_to_move(job, journal))
                _tokenize(job, journal)
            _publish(job, journal)
            return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: make room for {out}; the same command goes on where it was") from error
        raise UserError(f"cannot read or write {error.filename or out}: {error.strerror}") from error


def _parse(recipe: Recipe, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"data/{recipe.folder.name}/prepare.py",
        description="Writes train.bin, val.bin, meta.pkl and manifest.json. A stopped preparation goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--source", type=Path, help=SOURCE_HELP)
    if recipe.full_source:
        source.add_argument(
            "--full", action="store_true", help="the whole set of the hub in place of its sample, read as it streams"
        )
    add = parser.add_argument
    add("--tokenizer", default=recipe.tokenizer, help=TOKENIZER_HELP)
    add("--val_fraction", type=float, default=recipe.val_fraction, help=VAL_FRACTION_HELP)
    add("--limit", type=int, help="take only so many documents")
    add("--num_proc", type=int, default=os.cpu_count(), help="threads; the files are the same for any number")
    add("--out", type=Path, default=recipe.folder, help="folder to write to")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction={args.val_fraction}: it must lie between 0 and 1, such as 0.01")
    if args.num_proc < 1 or (args.limit is not None and args.limit < 1):
        raise UserError("--num_proc and --limit must be at least 1")
    return args


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there; where nothing comes of it, what was made for it goes again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in new:
            with suppress(OSError):  # it holds something
                path.rmdir()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, which the system releases however the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another prepare.py is at work on {folder}: wait for it, or pass another --out") from error
        except OSError as error:  # some cluster file systems have no locks
            print(f"{folder} cannot be locked ({error.strerror}): start no other prepare.py on it")
        yield
    finally:
        os.close(descriptor)


def _plan(recipe: Recipe, args: argparse.Namespace, out: Path) -> Job:
    if args.source:
        source: Source = local_source(args.source, args.val_fraction)
    else:
        make_source = recipe.full_source if recipe.full_source and args.full else recipe.source
        source = make_source(out, args.val_fraction)
    kind, _, size = args.tokenizer.partition(":")
    read = partial(_pieces, source, args.val_fraction, args.limit)
    if kind == "characters":
        tokenizer: Tokenizer = CharacterTokenizer.of_texts(piece.text for piece in read())
    elif kind == "bpe":
        if not size.isdecimal() or not 257 <= int(size) <= MAX_BPE_ENTRIES:
            allowed = f"from 257 to {MAX_BPE_ENTRIES:,}"
            raise UserError(f"--tokenizer={args.tokenizer}: bpe:N takes a number of entries {allowed}, such as bpe:4096")
        train = (piece.text for piece in read() if piece.split == "train" and piece.text)
        first = next(train, None)
        tokenizer = train_bpe(int(size), _sample(chain([first], train) if first else (piece.text for piece in read())))
        if tokenizer.vocab_size < int(size):
            print(f"--tokenizer={args.tokenizer}: the text gave only {tokenizer.vocab_size:,} entries")
    else:
        tokenizer = open_tokenizer(args.tokenizer)
    return Job(source, tokenizer, args.val_fraction, args.limit, args.num_proc, out)


def _sample(texts: Iterable[str]) -> Iterator[str]:
    n_chars = 0
    for text in texts:
        yield text
        n_chars += len(text)
        if n_chars >= BPE_SAMPLE_CHARS:
            return


def _is_prepared(job: Job) -> bool:
    try:
        manifest = Manifest.read(job.out / "manifest.json")
        sizes = [(job.out / f"{split}.bin").stat().st_size for split in SPLITS]
    except (UserError, OSError):
        return False
    n_bytes = [split.tokens * DTYPES[manifest.dtype].itemsize for split in (manifest.train, manifest.val)]
    return manifest.digest == job.digest() and sizes == n_bytes


# ---------------------------------------------------------------------------------------------------------------------
# Documents to tokens
# ---------------------------------------------------------------------------------------------------------------------


def _pieces(source: Source, val_fraction: float, limit: int | None, done: Journal | None = None) -> Iterator[Piece]:
    """All pieces but those that are done. Raises UserError where there is no text at all."""
    skip_documents, skip_pieces, moved = (done.documents, done.pieces, done.moved) if done else (0, 0, None)
    has_text = skip_documents > 0
    for document in source.documents(skip_documents, limit):
        split = document.split or split_of(document, val_fraction)
        if document.key == moved:
            split = "train" if split == "val" else "val"
        texts = iter(document.pieces)
        number, text = 0, next(texts, "")
        has_text = has_text or text != ""
        while text is not None:
            following = next(texts, None)
            if number >= skip_pieces:
                yield Piece(text, split, number == 0, following is None)
            number, text = number + 1, following
        skip_pieces = 0
    if not has_text:
        raise UserError(f"{source.name} has no text: name a source that has some with --source=...")


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def split_of(document: Document, val_fraction: float) -> Split:
    """By a hash of its key: the same in any order, on any machine, and for whatever documents come later."""
    return "val" if _hash(document.key) < val_fraction * 2**64 else "train"


def _to_move(job: Job, journal: Journal) -> str:
    """Key of the document that goes to the split that no other fell to: its hash is the nearest. Raises UserError."""
    keys = [document.key for document in job.source.documents(0, job.limit) if any(document.pieces)]
    if len(keys) < 2:
        shutil.rmtree(job.parts)
        raise UserError(f"{job.source.name} has only one document with text: val.bin needs one too; pass more text")
    split, nearest = ("val", min) if not journal.splits["val"].tokens else ("train", max)
    key = nearest(keys, key=_hash)
    print(f"none of {len(keys):,} documents fell to {split}.bin (--val_fraction={job.val_fraction}): document {key} goes there")
    return key


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    n_chars = 0
    for piece in pieces:
        batch.append(piece)
        n_chars += len(piece.text)
        if n_chars >= PIECE_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, dtype: str, batch: list[Piece]) -> dict[Split, tuple[np.ndarray, Progress]]:
    """The ids of a batch of pieces and what they add, by split. Runs in a thread of the pool."""
    eot = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], np.uint32)
    ids: dict[Split, list[np.ndarray]] = {split: [eot[:0]] for split in SPLITS}
    added = {split: Progress() for split in SPLITS}
    for piece, piece_ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
        if not piece.text:
            continue  # an empty document leaves nothing, not even an end of text
        ids[piece.split] += [piece_ids if piece.first else piece_ids[tokenizer.prefix_tokens :], eot[: piece.last]]
        added[piece.split].bytes += len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        added[piece.split].documents += piece.last
    arrays = {split: np.concatenate(ids[split]).astype(DTYPES[dtype]) for split in SPLITS}
    for split in SPLITS:
        added[split].tokens = len(arrays[split])
    return {split: (arrays[split], added[split]) for split in SPLITS}


def _tokenize(job: Job, journal: Journal) -> None:
    """Brings the files in `parts/` and the journal to the end of the source."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its own threads would come on top of ours
    job.parts.mkdir(exist_ok=True)
    batches = _batches(_pieces(job.source, job.val_fraction, job.limit, journal))
    done_bytes = sum(progress.bytes for progress in journal.splits.values())
    bar = tqdm(total=job.source.size_bytes, initial=done_bytes, desc="tokenizing", unit="B", unit_scale=True, disable=None)
    with ThreadPoolExecutor(job.num_proc) as pool, ExitStack() as stack, bar:
        stack.callback(_drop_unrecorded, job)
        files = {split: stack.enter_context(_open_part(job, split, journal.splits[split].tokens)) for split in SPLITS}
        saved_s = time.monotonic()
        for batch, encoded in _in_order(pool, partial(_encode, job.tokenizer, job.dtype), batches, 2 * job.num_proc):
            for split, (ids, added) in encoded.items():
                files[split].write(ids)
                journal.splits[split].add(added)
                bar.update(added.bytes)
            for piece in batch:
                journal.pieces += 1
                if piece.last:
                    journal.documents, journal.pieces = journal.documents + 1, 0
            if time.monotonic() - saved_s > JOURNAL_INTERVAL_S:
                _save(job, journal, files)
                saved_s = time.monotonic()
        _save(job, journal, files)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int
) -> Iterator[tuple[Any, Any]]:
    """Each item with function(item), in the order of the items; at most `ahead` wait or run, so memory stays flat."""
    pending: deque[tuple[Any, Future[Any]]] = deque()
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) > ahead:
            item, future = pending.popleft()
            yield item, future.result()
    for item, future in pending:
        yield item, future.result()


# ---------------------------------------------------------------------------------------------------------------------
# Files that survive a kill
# ---------------------------------------------------------------------------------------------------------------------


def _resume(job: Job) -> Journal:
    """The journal of the same job, stopped before, or an empty one."""
    journal = Journal.read(job.parts / "journal.json", job.digest())
    for split, progress in journal.splits.items():
        part = job.parts / f"{split}.bin"
        if progress.tokens and (not part.exists() or part.stat().st_size < progress.tokens * job.itemsize):
            return Journal(job.digest())
    if journal.documents or journal.pieces:
        print(f"going on behind {journal.documents:,} documents")
    return journal


def _drop_unrecorded(job: Job) -> None:
    if not (job.parts / "journal.json").exists():
        shutil.rmtree(job.parts)


def _open_part(job: Job, split: Split, n_tokens: int) -> IO[bytes]:
    """The split's unfinished file, cut back to its first n_tokens, open at its end."""
    file = (job.parts / f"{split}.bin").open("ab")
    file.truncate(n_tokens * job.itemsize)
    return file


def _save(job: Job, journal: Journal, files: dict[Split, IO[bytes]]) -> None:
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    path = job.parts / "journal.json"
    path.with_suffix(".new").write_text(json.dumps(asdict(journal)), encoding="utf-8")
    _sync(path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _publish(job: Job, journal: Journal) -> None:
    """Moves the finished files into the dataset's folder.

    The .bin files come last, train.bin at the very end: a .bin without its manifest would pass for another trainer's,
    while a manifest without its .bin is plainly not prepared.
    """
    manifests = {
        split: SplitManifest(progress.tokens, progress.bytes, progress.documents, _sha256(job.parts / f"{split}.bin"))
        for split, progress in journal.splits.items()
    }
    for name in DATASET_FILES:
        (job.out / name).unlink(missing_ok=True)
    job.tokenizer.save(job.out)
    Manifest(
        dtype=job.dtype,
        vocab_size=job.tokenizer.vocab_size,
        tokenizer=job.tokenizer.name,
        tokenizer_hash=job.tokenizer.hash,
        eot_id=job.tokenizer.eot_id,
        source=job.source.name,
        digest=job.digest(),
        **manifests,
    ).write(job.out / "manifest.json")
    for name in DATASET_FILES:
        if (job.out / name).exists():
            _sync(job.out / name)
    for split in ("val", "train"):
        (job.parts / f"{split}.bin").replace(job.out / f"{split}.bin")
    _sync(job.out)
    shutil.rmtree(job.parts, ignore_errors=True)
    for split, manifest in manifests.items():
        print(
            f"{job.out / split}.bin: {manifest.tokens:,} tokens of {manifest.bytes:,} bytes in {manifest.documents:,} documents"
        )
    if (n_val := manifests["val"].tokens) <= USUAL_CONTEXT:
        print(
            f"note: val.bin has only {n_val:,} tokens, and block_size={USUAL_CONTEXT} needs {USUAL_CONTEXT + 1}: prepare again "
            f"with a --val_fraction larger than {job.val_fraction:g}, or with more text"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, desc=f"hashing {path.name}", unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while block := file.read(HASH_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """What was written to the file, or renamed in the folder, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
