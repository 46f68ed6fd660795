"""A prepared dataset on disk, and the checks it passes before a model is built on it.

A dataset is a folder with `train.bin` and `val.bin` (token ids, little-endian uint16 or uint32, nothing else),
`manifest.json` (what the files hold) and `meta.pkl` (nanoGPT's: `vocab_size`, for characters also `stoi` and `itos`).
Files of another trainer have no manifest: they are taken as uint16, with the vocabulary of their meta.pkl or GPT-2's.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configurator import ROOT, DataConfig, UserError

FORMAT_VERSION = 1
GPT2_VOCAB_SIZE = 50_257
SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

SAMPLED_TOKENS = 1 << 20  # ids compared with the vocabulary unless all are: 256 windows of 4,096, a few milliseconds
SCAN_TOKENS = 1 << 24  # ids read at a time when all are


@dataclass(frozen=True)
class SplitManifest:
    """What one .bin holds."""

    tokens: int
    bytes: int  # UTF-8 bytes of the text; end-of-text ids stand for none
    documents: int
    sha256: str  # of the .bin file


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: what a dataset holds and where it came from."""

    dtype: str  # uint16 or uint32
    vocab_size: int  # ids are below it
    tokenizer: str  # "gpt2", "characters", or the name it was loaded under
    tokenizer_hash: str
    eot_id: int | None  # follows every document
    source: str  # for people
    digest: str  # of source and options: where it is the same, so are the files
    train: SplitManifest
    val: SplitManifest
    format_version: int = FORMAT_VERSION

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises UserError when the file is not a manifest of this version."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; run prepare.py again")
            for split in SPLITS:
                values[split] = SplitManifest(**values[split])
            manifest = cls(**values)
            if manifest.dtype not in DTYPES or manifest.vocab_size < 1:
                raise ValueError(f"dtype {manifest.dtype!r}, vocab_size {manifest.vocab_size!r}")
            return manifest
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged ({error}); run prepare.py again") from error


@dataclass(frozen=True)
class Dataset:
    """A checked dataset. `train` and `val` are read-only memory maps: nothing is loaded until it is read."""

    name: str
    folder: Path
    train: np.memmap  # (train tokens,) uint16 or uint32
    val: np.memmap  # (val tokens,)
    vocab_size: int  # entries that occur; the model's embedding may be padded (padded_vocab_size)
    manifest: Manifest | None = None  # None: made by another trainer

    @classmethod
    def without_tokens(cls, folder: Path, vocab_size: int) -> Dataset:
        """What is known of a dataset whose .bin files need not be on this machine; for its tokenizer."""
        manifest = Manifest.read(folder / "manifest.json") if (folder / "manifest.json").exists() else None
        nothing = np.empty(0, np.uint16)
        return cls(folder.name, folder, nothing, nothing, manifest.vocab_size if manifest else vocab_size, manifest)

    @property
    def eot_id(self) -> int | None:
        return self.manifest.eot_id if self.manifest else None

    @property
    def tokenizer(self) -> str | None:
        return self.manifest.tokenizer if self.manifest else None

    @property
    def tokenizer_hash(self) -> str | None:
        return self.manifest.tokenizer_hash if self.manifest else None

    @property
    def train_bytes_per_token(self) -> float | None:
        return self.manifest.train.bytes / self.manifest.train.tokens if self.manifest else None

    @property
    def val_bytes_per_token(self) -> float | None:
        """Bits per byte = loss in nats / ln 2 / this. End-of-text ids count as tokens of no bytes."""
        return self.manifest.val.bytes / self.manifest.val.tokens if self.manifest else None

    def embedding_rows(self, asked: int) -> int:
        """The model's vocab_size: as asked, 0 for the dataset's, padded. Raises UserError where ids would lie beyond it."""
        if 0 < asked < self.vocab_size:
            raise UserError(f"--vocab_size={asked}: {self.name} has {self.vocab_size:,} ids; pass at least that, or 0")
        return asked or padded_vocab_size(self.vocab_size)

    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged when a run is resumed; a value of None is not known."""
        return {
            "dataset": self.name,
            "vocab_size": self.vocab_size,
            "tokenizer_hash": self.tokenizer_hash,
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "train_sha256": self.manifest.train.sha256 if self.manifest else None,
            "val_sha256": self.manifest.val.sha256 if self.manifest else None,
        }


def dataset_folder(data: DataConfig) -> Path:
    """Where the dataset lies, prepared or not."""
    return (Path(data.data_dir) if data.data_dir else ROOT / "data") / data.dataset


def load_dataset(data: DataConfig, block_size: int) -> Dataset:
    """Opens `data.dataset` and checks it; `data.check_data` compares every id with the vocabulary, not a sample of them.

    Raises UserError: nothing prepared there; a .bin that is empty, torn, of another dtype or length than the manifest
    says, shorter than a block and its target, or with ids beyond the vocabulary; manifest.json or meta.pkl unreadable.
    """
    folder = dataset_folder(data)
    _check_is_name(data)
    if any(not (folder / f"{split}.bin").is_file() for split in SPLITS):
        raise UserError(how_to_prepare(folder))
    meta = read_meta(folder)
    manifest_path = folder / "manifest.json"
    manifest = Manifest.read(manifest_path) if manifest_path.exists() else None
    vocab_size = manifest.vocab_size if manifest else meta.get("vocab_size", GPT2_VOCAB_SIZE)
    splits = {}
    for split in SPLITS:
        path = folder / f"{split}.bin"
        tokens = open_tokens(path, manifest, block_size)
        _check_ids(path, tokens, vocab_size, data.check_data)
        if manifest is None:
            _check_looks_like_uint16(path, tokens)
        splits[split] = tokens
    return Dataset(data.dataset, folder, splits["train"], splits["val"], vocab_size, manifest)


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding: a multiple of 64 from 1,024 entries on, because GPUs multiply such matrices faster."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64


def read_meta(folder: Path) -> dict[str, Any]:
    """The dataset's meta.pkl, or {} where there is none. Nothing but plain builtins is read: no code of it can run.

    Raises UserError when it is no such file.
    """
    path = folder / "meta.pkl"
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        if not isinstance(meta, dict) or not isinstance(meta.get("vocab_size"), int) or meta["vocab_size"] < 1:
            raise ValueError("it has no vocab_size")
        return meta
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is not a plain nanoGPT meta.pkl ({error}); run prepare.py again, or delete the file") from error


class _PlainUnpickler(pickle.Unpickler):
    """dict, list, str, int and the like need no class looked up; whatever asks for one is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def how_to_prepare(folder: Path) -> str:
    """Why `folder` is no dataset to train on, and what to type."""
    missing = f"{folder} has no train.bin and val.bin"
    if (ROOT / "data" / folder.name / "prepare.py").is_file():
        out = "" if folder.parent == ROOT / "data" else f" --out {folder}"
        return f"{missing}: run python data/{folder.name}/prepare.py{out}"
    prepared = sorted(path.parent.name for path in folder.parent.glob("*/train.bin"))
    recipes = sorted({path.parent.name for path in (ROOT / "data").glob("*/prepare.py")} - set(prepared))
    near = difflib.get_close_matches(folder.name, [*prepared, *recipes], n=1)
    mean = f"did you mean {near[0]}? " if near else ""
    ready = f"prepared there: {', '.join(prepared)}; " if prepared else ""
    return (
        f"{missing}: {mean}{ready}to prepare: {', '.join(recipes)} (python data/NAME/prepare.py), or your own text with --source"
    )


def _check_is_name(data: DataConfig) -> None:
    """A path in place of the name of a folder is told apart: the name is in checkpoints. Raises UserError."""
    path = Path(data.dataset)
    if len(path.parts) > 1 and not (dataset_folder(data) / "train.bin").is_file():
        inside = path.parent == Path("data") and not data.data_dir
        where = "" if inside else f" --data_dir={path.parent}"
        raise UserError(f"--dataset={data.dataset} is a path, and takes a name: pass --dataset={path.name}{where}")


def open_tokens(path: Path, manifest: Manifest | None, block_size: int) -> np.memmap:
    """A .bin file, (tokens,), if it is what the manifest says and holds a block and its target. Raises UserError."""
    dtype = DTYPES[manifest.dtype if manifest else "uint16"]
    is_split = path.name in [f"{split}.bin" for split in SPLITS]  # any other file is not prepare.py's
    again = "; run prepare.py again" if is_split else ""
    try:
        n_bytes = path.stat().st_size
        if n_bytes == 0:
            raise UserError(f"{path} is empty{again}")
        if manifest and is_split:
            n_tokens = (manifest.train if path.stem == "train" else manifest.val).tokens
            if n_bytes != n_tokens * dtype.itemsize:
                other = "uint32" if manifest.dtype == "uint16" else "uint16"
                why = f"its dtype is {other}" if n_bytes == n_tokens * DTYPES[other].itemsize else "it is torn or of another run"
                raise UserError(
                    f"{path} has {n_bytes:,} bytes, but manifest.json says {n_tokens:,} tokens of {manifest.dtype} "
                    f"({n_tokens * dtype.itemsize:,} bytes): {why}; run prepare.py again"
                )
        if n_bytes % dtype.itemsize:
            raise UserError(f"{path} has {n_bytes:,} bytes, which are not whole {dtype.name} tokens{again}")
        if n_bytes // dtype.itemsize < block_size + 1:
            larger = ", or prepare again with a larger --val_fraction" if manifest and path.stem == "val" else ""
            raise UserError(
                f"{path} has {n_bytes // dtype.itemsize:,} tokens, but block_size={block_size} needs {block_size + 1:,} "
                f"(a block and its target): use a smaller --block_size or more text{larger}"
            )
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _check_ids(path: Path, tokens: np.memmap, vocab_size: int, check_all: bool) -> None:
    window = SCAN_TOKENS if check_all else 4096
    n_windows = -(-len(tokens) // window)
    if not check_all:
        n_windows = min(n_windows, SAMPLED_TOKENS // window)
    starts = np.linspace(0, max(0, len(tokens) - window), n_windows).astype(np.int64)
    for start in tqdm(starts, desc=f"checking {path.name}", unit="window", disable=not check_all, leave=False):
        ids = tokens[start : start + window]
        if (highest := int(ids.max())) >= vocab_size:
            where = int(start + ids.argmax())
            raise UserError(
                f"{path} has id {highest:,} at token {where:,}, beyond the vocabulary of {vocab_size:,}: "
                f"another tokenizer's or another dtype's file; run prepare.py again (or give it the right meta.pkl)"
            )


def _check_looks_like_uint16(path: Path, tokens: np.memmap) -> None:
    """Wider ids read as uint16 show as a zero after every id."""
    head = tokens[: min(len(tokens), SAMPLED_TOKENS) & ~1]
    if len(head) and not head[1::2].any() and head[::2].any():
        raise UserError(f"{path} looks like uint32, but without a manifest.json it must be uint16: convert it, or run prepare.py")
