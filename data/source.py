"""Where documents come from: local files (text, .jsonl, .parquet, plain or compressed), the web, the Hugging Face hub.

Documents arrive one after the other, each in pieces of some hundred kilobytes, so memory stays flat whatever their size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from configurator import UserError

PIECE_CHARS = 1 << 18  # what is tokenised in one go
LONGEST_PIECE_CHARS = 1 << 19  # text without a line break in so many characters is cut at a space, or anywhere
LONGEST_LINE_BYTES = 1 << 26  # of a .jsonl file
PARQUET_ROWS = 256  # read at a time
NETWORK_TIMEOUT_S = 10.0
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Document:
    key: str  # decides the split, where the source does not
    pieces: Iterable[str]
    split: Split | None = None


class Source(Protocol):
    name: str  # for people
    size_bytes: int | None  # of the text, where that is known beforehand

    def identity(self) -> str:
        """Changes when the documents do."""

    def documents(self, skip: int, limit: int | None) -> Iterator[Document]:
        """All but the first `skip` of the first `limit` documents (of each split, where the source has its own)."""


class FileSource:
    """Files, each a document, but a line of .jsonl and a row of .parquet (their field `text`) is one too.

    One single text file is two documents: its last `val_fraction` characters are the validation split, as in nanoGPT.
    """

    def __init__(self, name: str, files: list[tuple[str, Path]], val_fraction: float) -> None:
        self.name, self.files, self.val_fraction = name, files, val_fraction
        plain = all(_kind(path) == ("text", "") for _, path in files)
        self.size_bytes = sum(path.stat().st_size for _, path in files) if plain else None

    def identity(self) -> str:
        stats = [(key, path.stat().st_size, path.stat().st_mtime_ns) for key, path in self.files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def documents(self, skip: int, limit: int | None) -> Iterator[Document]:
        return islice(self._documents(), skip, limit)

    def _documents(self) -> Iterator[Document]:
        if len(self.files) == 1 and _kind(self.files[0][1])[0] == "text":
            key, path = self.files[0]
            cut = int(sum(map(len, _file_text(path))) * (1 - self.val_fraction))
            yield Document(key, cut_pieces(_file_text(path, 0, cut)), "train")
            yield Document(key, cut_pieces(_file_text(path, cut)), "val")
            return
        for key, path in self.files:
            kind, _ = _kind(path)
            if kind == "text":
                yield Document(key, cut_pieces(_file_text(path)))
            else:
                rows = _json_rows(path) if kind == "jsonl" else _parquet_rows(path)
                for number, text in enumerate(rows):
                    yield Document(f"{key}:{number}", cut_pieces(_row_text(text)))


class HubSource:
    """A dataset of the Hugging Face hub with a field `text`; its own validation split is kept where it has one."""

    size_bytes = None

    def __init__(self, repository: str, part: str | None = None, streaming: bool = False) -> None:
        """`part` is what the hub calls a configuration or subset."""
        self.repository, self.part, self.streaming = repository, part, streaming
        self.name = repository if part is None else f"{repository}:{part}"

    def identity(self) -> str:
        return f"hub:{self.name}"

    def documents(self, skip: int, limit: int | None) -> Iterator[Document]:
        advice = "check the network, or pass --source with a local file or folder of text, .jsonl or .parquet"
        with _reading(f"{self.name} of the Hugging Face hub", advice):
            parts = self._load()
            splits: dict[str, Split | None] = {"train": None}
            if "validation" in parts:
                splits = {"validation": "val", "train": "train"}
            for name, split in splits.items():
                rows, first = parts[name], 0
                if limit is not None:
                    rows = rows.take(limit if self.streaming else min(limit, len(rows)))
                if not self.streaming:  # the rows are on this disk: no need to read those that are done
                    first = min(skip, len(rows))
                    skip -= first
                    rows = rows.select(range(first, len(rows))) if first < len(rows) else ()
                for number, row in enumerate(rows, first):
                    if skip:
                        skip -= 1
                    else:
                        yield Document(str(number), cut_pieces(_row_text(row["text"] or "")), split)

    def _load(self) -> Any:
        go_offline_without_network()
        import datasets

        return datasets.load_dataset(self.repository, self.part, streaming=self.streaming).select_columns(["text"])


def local_source(path: Path, val_fraction: float) -> FileSource:
    """A file, or all files under a folder but hidden ones, in the order of their names. Raises UserError when there is none."""
    if not path.exists():
        raise UserError(f"--source {path}: there is no such file or folder")
    files = [(path.name, path)]
    if path.is_dir():
        found = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        files = [(key, file) for key, file in found if not any(part.startswith(".") for part in key.split("/"))]
    if not files:
        raise UserError(f"--source {path}: the folder has no files")
    return FileSource(str(path), files, val_fraction)


def web_text(url: str, path: Path, val_fraction: float) -> FileSource:
    """A text from the web, kept at `path`. Raises UserError when it is not there and cannot be downloaded."""
    return FileSource(url, [(path.name, download_once(url, path))], val_fraction)


def download_once(url: str, path: Path, flag: str = "--source") -> Path:
    """`path`, which has the contents of `url` from the first time on.

    Raises UserError, which names the flag that takes a copy, where they cannot be downloaded.
    """
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT_S) as response:
                contents = response.read()
        except (OSError, HTTPException) as error:
            raise UserError(f"cannot download {url}: check the network, or pass {flag} with a local copy\n({error})") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(contents)
        partial.replace(path)
    return path


def go_offline_without_network() -> None:
    """Without a network Hugging Face's libraries retry for a minute; told so, they take what is cached or fail at once."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=NETWORK_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


# ---------------------------------------------------------------------------------------------------------------------
# Reading files
# ---------------------------------------------------------------------------------------------------------------------


def _kind(path: Path) -> tuple[str, str]:
    """What is in the file (text, jsonl or parquet), and how it is compressed ("", gzip or zstd)."""
    suffixes = path.suffixes
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix, "")
    content = suffixes[-2:-1] if compression else suffixes[-1:]
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get("".join(content), "text"), compression


@contextmanager
def _reading(what: Path | str, advice: str = "") -> Iterator[None]:
    """Whatever goes wrong in a reader is the source's fault, and the user's to know."""
    try:
        yield
    except UnicodeDecodeError as error:
        what_to_do = "take it out of the source, or convert it (iconv -f LATIN1 -t UTF-8)"
        raise UserError(
            f"cannot read {what}: it is not UTF-8 text (byte {error.object[error.start]:#x}): {what_to_do}"
        ) from error
    except Exception as error:  # decoders, pyarrow, the hub's libraries, the network and the disk each have their own
        cause = str(error).strip().split("\n")[0][:300]
        raise UserError(f"cannot read {what}: {advice}\n({cause})" if advice else f"cannot read {what}: {cause}") from error


def _open(path: Path) -> IO[bytes]:
    compression = _kind(path)[1]
    if not compression:
        return path.open("rb")
    import pyarrow

    # Its reader, unlike zstandard's, goes on with the next frame and does not take a torn file for a whole one.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 1 << 20)


def _file_text(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The characters [start, stop) of a text file, some at a time."""
    with _reading(path), io.TextIOWrapper(_open(path), encoding="utf-8", newline="") as file:
        position = 0
        while (stop is None or position < stop) and (text := file.read(PIECE_CHARS)):
            yield text[max(0, start - position) : None if stop is None else stop - position]
            position += len(text)


def _json_rows(path: Path) -> Iterator[str]:
    with _reading(path), _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES):
            number += 1
            if len(line) == LONGEST_LINE_BYTES:
                raise ValueError(f"line {number} is longer than {LONGEST_LINE_BYTES >> 20} MiB")
            if line.isspace():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f'line {number} is not a JSON object with a field "text"') from error
            if not isinstance(text, str):
                raise ValueError(f'line {number}: its field "text" is not a string')
            if b"\\u" in line:  # half of a surrogate pair can be written in JSON, but has no UTF-8
                text = text.encode("utf-8", "replace").decode()
            yield text


def _parquet_rows(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    with _reading(path), pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        if "text" not in file.schema_arrow.names:
            raise ValueError(f'it has no column "text", only {", ".join(file.schema_arrow.names)}')
        for batch in file.iter_batches(PARQUET_ROWS, columns=["text"]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def _row_text(row: str) -> Iterator[str]:
    return (row[start : start + PIECE_CHARS] for start in range(0, len(row), PIECE_CHARS))


def cut_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Text that comes some at a time, cut where no tokenizer notices, into pieces of PIECE_CHARS or a little more.

    That is before a line break that follows a letter or digit: byte-level BPE tokenizers (GPT-2's and later ones) split
    there anyway, and no SentencePiece of LLaMA's kind holds a line break. Where LONGEST_PIECE_CHARS have no such place,
    the cut is at a space, and failing that anywhere: only there may tokens differ from those of the text in one piece.
    """
    buffer = ""
    for text in texts:
        buffer += text
        if len(buffer) > PIECE_CHARS:
            cut = _last_cut(buffer, "\n")
            if not cut and len(buffer) > LONGEST_PIECE_CHARS:
                cut = _last_cut(buffer, " ") or len(buffer)
            if cut:
                yield buffer[:cut]
                buffer = buffer[cut:]
    if buffer:
        yield buffer


def _last_cut(text: str, separator: str) -> int:
    """Index of the last separator that follows a letter or digit, or 0."""
    cut = text.rfind(separator)
    while cut > 0 and not text[cut - 1].isalnum():
        cut = text.rfind(separator, 0, cut)
    return max(cut, 0)
