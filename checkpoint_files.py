"""The format of one checkpoint on disk: a folder that is written whole, verified before use, exact to the bit.

    .metadata, __0_0.distcp ...   tensors, as torch.distributed.checkpoint (DCP) lays them out: __RANK_NUMBER.distcp
    state.json                    everything else that a resumed run needs
    manifest.json                 written last: format version, size and SHA-256 of every file, and its own checksum

torch is imported inside the functions that need it: `checkpoint.py --help` and `list` answer at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configurator import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
    from torch.distributed.checkpoint.storage import WriteResult

    from parallel import Ranks

    IndexedTensor = tuple[MetadataIndex, torch.Tensor]

FORMAT_VERSION = 1
MAX_FILES = 8  # of tensors in a checkpoint, each written, hashed and read by a thread of its own
MIN_FILE_BYTES = 64 * 2**20  # below this a second file costs more than it gains
HASH_CHUNK_BYTES = 2**20  # hashed and written while it is in the cache; larger ones slow training more


class DamagedError(Exception):
    """What is wrong with a checkpoint on disk."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor: what one rank holds, saves or wants of it."""

    rows: torch.Tensor
    first_row: int
    shape: tuple[int, ...]  # of the whole tensor

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Piece:
        return cls(tensor, 0, tuple(tensor.shape))

    def share(self, number: int, n_shares: int) -> Piece | None:
        """One of `n_shares` parts of its rows; None where none is left for it. A scalar is the first one's."""
        if not self.shape:
            return self if number == 0 else None
        size = -(-len(self.rows) // n_shares)
        rows = self.rows[number * size : (number + 1) * size]
        return Piece(rows, self.first_row + number * size, self.shape) if len(rows) else None

    @property
    def offsets(self) -> tuple[int, ...]:
        return (self.first_row, *[0] * (len(self.shape) - 1)) if self.shape else ()


def as_pieces(tensors: Mapping[str, torch.Tensor | Piece]) -> dict[str, Piece]:
    """A plain tensor is a piece that is whole."""
    return {name: t if isinstance(t, Piece) else Piece.whole(t) for name, t in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor | Piece],
    state: str,
    about: dict[str, Any],
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Makes `folder` a checkpoint; all of it is on the disk when this returns. Returns the manifest. Raises OSError.

    The tensors are on the CPU, each alone in its storage; `state` is JSON; `about` (run_name, iter, val_loss) joins the manifest.
    With several `ranks` each brings its own pieces, and is back when its own are on the disk; rank 0 when all is.
    """
    ranks.agree(folder.mkdir) if ranks else folder.mkdir()
    files = _write_tensors(folder, as_pieces(tensors), ranks)
    if ranks is not None and not ranks.is_main:
        return {}
    files["state.json"] = _write_text(folder / "state.json", state)
    manifest = {"format_version": FORMAT_VERSION, "saved_at": datetime.now(UTC).isoformat(), **about, "files": files}
    manifest["manifest_sha256"] = manifest_digest(manifest)
    _write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    sync(folder)
    return manifest


def link_checkpoint(source: Path, folder: Path) -> None:
    """Makes `folder` the same checkpoint as `source`: by hard links, or copies where the file system has none."""
    folder.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
            sync(folder / file.name)
    sync(folder)


def sync(path: Path) -> None:
    """Returns when the file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The manifest's own checksum: of all its other fields. This rule holds for every format version."""
    fields = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _write_tensors(folder: Path, pieces: dict[str, Piece], ranks: Ranks | None) -> dict[str, dict[str, Any]]:
    """Writes the tensors in DCP's format and returns size and SHA-256 of each file, of all ranks.

    DCP's own writer drops the errors of all its threads but one (a full disk can leave a checkpoint that looks whole), and
    its files would have to be read again for their checksums. So the writing of data is ours, the format DCP's.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
    from torch.futures import Future

    files: dict[str, dict[str, Any]] = {}

    class PiecePlanner(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> dcp.SavePlan:
            items = [self._item(name, piece) for name, piece in pieces.items()]
            self.plan = dcp.SavePlan(items, planner_data={name: (name,) for name in pieces})  # for PyTorch's own tools
            return self.plan

        def _item(self, name: str, piece: Piece) -> WriteItem:
            chunk, properties = _chunk(piece), TensorProperties.create_from_tensor(piece.rows)
            data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(piece.shape))
            return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

        def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
            return pieces[index.fqn].rows

    class HashingWriter(dcp.FileSystemWriter):
        def storage_meta(self) -> None:
            """Nothing: DCP would pickle a path into .metadata."""

        def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
            bins = _split([(item.index, planner.resolve_data(item).detach()) for item in plan.items])
            paths = [folder / f"{plan.storage_data.prefix}{number}.distcp" for number in range(len(bins))]
            with ThreadPoolExecutor(len(bins)) as pool:
                written = list(pool.map(_write_tensor_file, paths, bins))
            files.update({path.name: entry for path, (entry, _) in zip(paths, written, strict=True)})
            done: Future[list[WriteResult]] = Future()
            done.set_result([result for _, results in written for result in results])
            return done

    several = ranks is not None and ranks.world_size > 1
    with _quiet_dcp():
        group = ranks.group if several else None
        dcp.save({}, storage_writer=HashingWriter(folder), planner=PiecePlanner(), process_group=group, no_dist=not several)
    if several:
        files = {name: entry for each in ranks.all_of(files) for name, entry in each.items()}
    if not several or ranks.is_main:
        metadata = (folder / ".metadata").read_bytes()
        files[".metadata"] = {"bytes": len(metadata), "sha256": hashlib.sha256(metadata).hexdigest()}
    return files


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    from torch import Size
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=Size(piece.offsets), sizes=piece.rows.size())


def _split(items: list[IndexedTensor]) -> list[list[IndexedTensor]]:
    """Tensors over files of about equal size: the largest first, each into the file that is smallest so far."""
    n_files = max(1, min(MAX_FILES, sum(tensor.nbytes for _, tensor in items) // MIN_FILE_BYTES))
    bins: list[list[IndexedTensor]] = [[] for _ in range(n_files)]
    filled = [0] * n_files
    for item in sorted(items, key=lambda item: -item[1].nbytes):
        smallest = filled.index(min(filled))
        bins[smallest].append(item)
        filled[smallest] += item[1].nbytes
    return bins


def _write_tensor_file(path: Path, items: list[IndexedTensor]) -> tuple[dict[str, Any], list[WriteResult]]:
    """(size and SHA-256 of the file, for DCP where in it each tensor is)."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    results = []
    with _HashedFile(path) as file:
        for index, tensor in items:
            offset = file.n_bytes
            torch.save(tensor, file)
            length = file.n_bytes - offset
            results.append(WriteResult(index, length, _StorageInfo(path.name, offset, length)))
    return file.entry(), results


def _write_text(path: Path, text: str) -> dict[str, Any]:
    with _HashedFile(path) as file:
        file.write(text.encode())
    return file.entry()


class _HashedFile(io.BufferedWriter):
    """A file for writing that is hashed on its way, and on the disk when it is closed."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"), HASH_CHUNK_BYTES)
        self._sha256 = hashlib.sha256()
        self.n_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), HASH_CHUNK_BYTES):
            chunk = view[start : start + HASH_CHUNK_BYTES]
            self._sha256.update(chunk)
            super().write(chunk)
        self.n_bytes += len(view)
        return len(view)

    def close(self) -> None:
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.n_bytes, "sha256": self._sha256.hexdigest()}


@contextlib.contextmanager
def _quiet_dcp() -> Iterator[None]:
    """Without DCP's warning that it runs on one process, and with the true cause in place of its CheckpointException."""
    from torch.distributed.checkpoint.api import CheckpointException

    # Not warnings.catch_warnings: that restores the filters of all threads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        yield
    except CheckpointException as error:  # a BaseException
        raise next(iter(error.failures.values()))[0] from error


# ---------------------------------------------------------------------------------------------------------------------
# Reading: nothing is used before it is verified
# ---------------------------------------------------------------------------------------------------------------------


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a checkpoint, whole or damaged. (A dataset has a manifest.json, too.)"""
    return any((folder / name).exists() for name in ("state.json", ".metadata", "__0_0.distcp"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, which matches its own checksum. Raises DamagedError; UserError if it is of a newer format."""
    with _damage("manifest.json"):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["manifest_sha256"] != manifest_digest(manifest):
            raise DamagedError("manifest.json does not match its own checksum")
        version = manifest["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}: use the newer program")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], checksums: bool) -> None:
    """Compares every file with the manifest, in size and where asked for in checksum. Raises DamagedError."""

    def check(name: str) -> None:
        entry = manifest["files"][name]
        with _damage(name), (folder / name).open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes != entry["bytes"]:
                raise DamagedError(f"{name} has {n_bytes:,} bytes, not {entry['bytes']:,}")
            if checksums and hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise DamagedError(f"{name} does not match its checksum")

    with ThreadPoolExecutor(MAX_FILES) as pool:
        list(pool.map(check, manifest["files"]))


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Whatever goes wrong with the file `name` is damage."""
    try:
        yield
    except DamagedError:
        raise
    except FileNotFoundError:
        raise DamagedError(f"{name} is missing") from None
    except Exception as error:  # a file of other content can fail in any way
        raise DamagedError(f"{name} cannot be read: {error}") from None


# All that DCP's metadata of tensors is made of, but for dtypes.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": """Metadata MetadataIndex TensorStorageMetadata ChunkStorageMetadata
        TensorProperties _MEM_FORMAT_ENCODING""".split(),
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch": ["Size"],
    "torch.serialization": ["_get_layout"],  # looks up torch.strided and its like by name
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds plain records of tensors and nothing else, so that no code of the file's choice can run."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in METADATA_CLASSES.get(module, ()):
            raise DamagedError(f".metadata asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _read_metadata(folder: Path, manifest: dict[str, Any]) -> Metadata:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _damage(".metadata"), (folder / ".metadata").open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise DamagedError(".metadata lists something that is no tensor")
        for info in metadata.storage_data.values():
            if info.relative_path not in manifest["files"]:
                raise DamagedError(f".metadata points to {info.relative_path}, which is not in the manifest")
    return metadata


def open_checkpoint(folder: Path, checksums: bool = True) -> Checkpoint:
    """A checkpoint, verified (without `checksums`, which another rank has compared, only in size).

    Raises DamagedError; UserError if it is of a newer format.

    A running writer may put a newer one in its place meanwhile: then it is that one, from the start.
    """
    manifest = read_manifest(folder)
    try:
        check_files(folder, manifest, checksums)
        with _damage("state.json"):
            state = json.loads((folder / "state.json").read_bytes())
        metadata = _read_metadata(folder, manifest)
    except DamagedError:
        if _is_still(folder, manifest):
            raise
    else:
        if _is_still(folder, manifest):
            return Checkpoint(folder, manifest, state, metadata)
    return open_checkpoint(folder, checksums)


def _is_still(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether `folder` is the checkpoint that it was when `manifest` was read."""
    try:
        return read_manifest(folder)["manifest_sha256"] == manifest["manifest_sha256"]
    except DamagedError:
        return False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have all been verified."""

    path: Path
    manifest: dict[str, Any]
    state: dict[str, Any]
    metadata: Metadata

    @property
    def iter(self) -> int:
        return self.manifest["iter"]

    def load(self, tensors: Mapping[str, torch.Tensor | Piece]) -> None:
        """Copies every saved tensor into `tensors`, or what they hold of it, in place and bit by bit.

        UserError with a table where names, shapes or dtypes differ; then nothing has been copied.
        """
        saved, pieces = self.describe_tensors(), as_pieces(tensors)
        wanted = {name: _describe(piece.shape, piece.rows.dtype) for name, piece in pieces.items()}
        names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        if names:
            rows = [(name, saved.get(name, "missing"), wanted.get(name, "missing")) for name in names[:10]]
            more = f"\n... and {len(names) - 10} more" if len(names) > 10 else ""
            raise UserError(f"{self.path} is of another model:\n{table(('tensor', 'checkpoint', 'this run'), rows)}{more}")
        self._read(pieces)

    def read_tensors(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """New CPU tensors: `names`, or all of the model and none of the optimizer's."""
        import torch

        saved = self.metadata.state_dict_metadata
        wanted = [name for name in saved if name.startswith("model.")] if names is None else names
        tensors = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in wanted}
        self._read(as_pieces(tensors))
        return tensors

    def describe_tensors(self) -> dict[str, str]:
        """Dtype and shape of every tensor in it, such as `float32 [5, 3]`."""
        saved = self.metadata.state_dict_metadata
        return {name: _describe(entry.size, entry.properties.dtype) for name, entry in saved.items()}

    def _read(self, pieces: dict[str, Piece]) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        metadata, tensors = self.metadata, {name: piece.rows.detach() for name, piece in pieces.items() if piece.rows.numel()}

        class PiecePlanner(dcp.DefaultLoadPlanner):
            def create_local_plan(self) -> dcp.LoadPlan:
                saved, wanted = metadata.state_dict_metadata, {name: [_chunk(pieces[name])] for name in tensors}
                items = [create_read_items_for_chunk_list(name, saved[name], chunks) for name, chunks in wanted.items()]
                return dcp.LoadPlan([item for each in items for item in each])

            def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
                return tensors[index.fqn]

        class VerifiedReader(dcp.FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
                """What our unpickler let through; DCP's own would run whatever the file says."""
                return metadata

            def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Any:
                """DCP's, one thread a file."""
                by_file: dict[str, list[Any]] = {}
                for item in plan.items:
                    by_file.setdefault(metadata.storage_data[item.storage_index].relative_path, []).append(item)
                read = super().read_data
                with ThreadPoolExecutor(MAX_FILES) as pool:
                    list(pool.map(lambda items: read(replace(plan, items=items), planner), by_file.values()))
                return read(replace(plan, items=[]), planner)

        try:
            with _quiet_dcp():
                dcp.load(tensors, storage_reader=VerifiedReader(self.path), planner=PiecePlanner(), no_dist=True)
        except (OSError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error
        if not _is_still(self.path, self.manifest):
            raise UserError(f"{self.path} was replaced by a newer one while it was read: run the command again.")


def _describe(shape: Iterable[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
