"""Checkpoints: published whole or not at all, verified before use, exact to the bit.

    out_dir/checkpoints/<tier>/     latest, latest_backup, rolling_step_N, epoch_N, best_model
        .metadata, __0_0.distcp ... tensors, as torch.distributed.checkpoint (DCP) lays them out
        state.json                  everything else that a resumed run needs
        manifest.json               written last: format version, size and SHA-256 of every file

A checkpoint is written into `.writing-<tier>` and renamed when it is whole. Of the checkpoints that have the name already,
`latest` becomes `latest_backup` and any other `.old-<tier>` until the new one is in place, so that at every instant what
was whole is still there under a name that readers know. Tiers of one step share their files by hard links.

torch is imported inside the functions that need it: `--help` and `list` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import queue
import re
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from configurator import CheckpointConfig, UserError, run_command

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

FORMAT_VERSION = 1
FOLDER = "checkpoints"  # of out_dir
MAX_FILES = 8  # of tensors in a checkpoint, each written, hashed and read by a thread of its own
MIN_FILE_BYTES = 64 * 2**20  # below this a second file costs more than it gains
HASH_CHUNK_BYTES = 2**20  # hashed and written while it is in the cache; larger ones slow training more


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedCheckpoint:
    """One tier that has been published; `save_s` counts from the call of save()."""

    tier: str
    path: Path
    iter: int
    bytes: int
    save_s: float
    val_loss: float | None


class CheckpointStore:
    """Writes the checkpoints of one run in the background. The caller holds `lock_out_dir`.

    `on_saved` hears of every tier that was published and `on_warning` of every failure, both from poll(), wait() and
    save(), on the caller's thread. A disk that is full or fails is a warning: training goes on.
    """

    def __init__(
        self,
        out_dir: Path,
        cfg: CheckpointConfig,
        on_saved: Callable[[SavedCheckpoint], None],
        on_warning: Callable[[str], None],
    ):
        self._root = Path(out_dir) / FOLDER
        self._cfg = cfg
        self._on_saved = on_saved
        self._on_warning = on_warning
        self._host: dict[str, torch.Tensor] = {}  # host copies, reused by every save
        self._writer: threading.Thread | None = None
        self._reports: queue.SimpleQueue[SavedCheckpoint | str | BaseException] = queue.SimpleQueue()

    def save(self, iter: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], tiers: Sequence[str]) -> float:
        """Copies `tensors` and `state` (JSON) and returns the seconds that took; a thread writes them as every one of `tiers`.

        `state["run_name"]` and, where there is one, `state["val_loss"]` are repeated in the manifest. Waits for the save before.
        """
        t0_s = time.perf_counter()
        self.wait()
        about = {"run_name": state["run_name"], "iter": iter, "val_loss": state.get("val_loss")}
        args = (about, self._copy_to_host(tensors), json.dumps(state, indent=1), tuple(tiers), t0_s)
        self._writer = threading.Thread(target=self._write, args=args, name="checkpoint")
        self._writer.start()
        return time.perf_counter() - t0_s

    def poll(self) -> None:
        """Passes on what the writer has to report. An error that is neither the disk's nor expected is raised here."""
        while not self._reports.empty():
            report = self._reports.get()
            if isinstance(report, BaseException):
                raise report
            if isinstance(report, SavedCheckpoint):
                self._on_saved(report)
            else:
                self._on_warning(report)

    def wait(self) -> None:
        """Returns when everything is published, and reports."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.poll()

    def close(self) -> None:
        """wait(), and gives the host copies back."""
        self.wait()
        self._host.clear()

    def _copy_to_host(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        host = {}
        for name, tensor in tensors.items():
            copy = self._host.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host[name] = copy.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # one wait for all copies
        self._host = host
        return host

    def _write(
        self, about: dict[str, Any], tensors: dict[str, torch.Tensor], state: str, tiers: tuple[str, ...], t0_s: float
    ) -> None:
        """The writer thread: one checkpoint under every name of `tiers`."""
        needed_bytes = sum(tensor.nbytes for tensor in tensors.values()) + len(state)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            _clean_up(self._root)
            if needed_bytes > shutil.disk_usage(self._root).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            source = None
            for tier in tiers:
                folder = self._root / f".writing-{tier}"
                folder.mkdir()
                if source is None:
                    manifest = _write_folder(folder, about, tensors, state)
                else:
                    _link_folder(source, folder)
                source = _publish(folder, tier)
                elapsed_s = time.perf_counter() - t0_s
                self._reports.put(SavedCheckpoint(tier, source, about["iter"], _size(manifest), elapsed_s, about["val_loss"]))
            self._prune()
        except OSError as error:
            self._reports.put(self._describe(error, about["iter"], needed_bytes))
        except BaseException as error:
            self._reports.put(error)

    def _describe(self, error: OSError, iter: int, needed_bytes: int) -> str:
        with contextlib.suppress(OSError):  # makes room again, where the disk lets us
            _clean_up(self._root)
        what = f"checkpoint of step {iter} not saved in {self._root}: {error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_bytes = shutil.disk_usage(self._root).free
            what += f"; it needs {needed_bytes:,} bytes and {free_bytes:,} are free"
        return f"{what}. Training goes on; earlier checkpoints are untouched."

    def _prune(self) -> None:
        tiers = _tiers(self._root)  # by the time they were saved: a run that went back to an earlier step keeps its new ones
        for prefix, keep in (("rolling_step_", self._cfg.keep_rolling), ("epoch_", self._cfg.keep_epochs)):
            for tier in [tier for tier in tiers if tier.startswith(prefix)][keep:]:
                _delete(tiers[tier])


def _write_folder(folder: Path, about: dict[str, Any], tensors: dict[str, torch.Tensor], state: str) -> dict[str, Any]:
    """Writes one checkpoint, the manifest last, all of it on the disk when this returns. Returns the manifest."""
    files = _write_tensors(folder, tensors)
    files["state.json"] = _write_text(folder / "state.json", state)
    manifest = {"format_version": FORMAT_VERSION, **about, "saved_at": datetime.now(UTC).isoformat(), "files": files}
    manifest["manifest_sha256"] = _manifest_digest(manifest)
    _write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    _sync_folder(folder)
    return manifest


def _write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Writes `tensors` in DCP's format and returns size and SHA-256 of each file.

    DCP's own writer drops the errors of all its threads but one (a full disk can leave a checkpoint that looks whole), and
    its files would have to be read again for their checksums. So the writing of data is ours, the format DCP's.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult
    from torch.futures import Future

    files: dict[str, dict[str, Any]] = {}

    class HashingWriter(dcp.FileSystemWriter):
        def storage_meta(self) -> None:
            """Nothing: DCP would pickle a path into .metadata."""

        def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
            def write_file(index: int) -> list[WriteResult]:
                name = f"{plan.storage_data.prefix}{index}.distcp"
                results = []
                with _HashedFile(folder / name) as file:
                    for item in bins[index]:
                        offset = file.n_bytes
                        torch.save(planner.resolve_data(item).detach(), file)
                        length = file.n_bytes - offset
                        results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
                files[name] = file.entry()
                return results

            bins = _split([(planner.resolve_data(item).nbytes, item) for item in plan.items])
            with ThreadPoolExecutor(len(bins)) as pool:
                results = [result for file_results in pool.map(write_file, range(len(bins))) for result in file_results]
            done: Future[list[WriteResult]] = Future()
            done.set_result(results)
            return done

    with _quiet_dcp():
        dcp.save(tensors, storage_writer=HashingWriter(folder), no_dist=True)
    metadata = (folder / ".metadata").read_bytes()
    files[".metadata"] = {"bytes": len(metadata), "sha256": hashlib.sha256(metadata).hexdigest()}
    return files


def _split(sized_items: list[tuple[int, Any]]) -> list[list[Any]]:
    """Items over files of about equal size: the largest first, each into the file that is smallest so far."""
    total_bytes = sum(n_bytes for n_bytes, _ in sized_items)
    bins: list[list[Any]] = [[] for _ in range(max(1, min(MAX_FILES, total_bytes // MIN_FILE_BYTES)))]
    filled = [0] * len(bins)
    for n_bytes, item in sorted(sized_items, key=lambda sized: -sized[0]):
        smallest = filled.index(min(filled))
        bins[smallest].append(item)
        filled[smallest] += n_bytes
    return bins


class _HashedFile:
    """A file for writing that is hashed on its way, and on the disk when it is closed."""

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=HASH_CHUNK_BYTES)
        self._sha256 = hashlib.sha256()
        self.n_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), HASH_CHUNK_BYTES):
            chunk = view[start : start + HASH_CHUNK_BYTES]
            self._sha256.update(chunk)
            self._file.write(chunk)
        self.n_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.n_bytes, "sha256": self._sha256.hexdigest()}

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _write_text(path: Path, text: str) -> dict[str, Any]:
    with _HashedFile(path) as file:
        file.write(text.encode())
    return file.entry()


def _manifest_digest(manifest: dict[str, Any]) -> str:
    """The manifest's own checksum: of all its other fields. This rule holds for every format version."""
    fields = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _link_folder(source: Path, target: Path) -> None:
    """The same files under a second folder: hard links, or copies where the file system has none."""
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            with file.open("rb") as original, _HashedFile(target / file.name) as copy:
                shutil.copyfileobj(original, copy, HASH_CHUNK_BYTES)
    _sync_folder(target)


def _publish(folder: Path, tier: str) -> Path:
    """Gives a finished folder its name; what had the name moves on. A kill between two renames leaves whole checkpoints."""
    root, target = folder.parent, folder.parent / tier
    leaving = root / "latest_backup" if tier == "latest" and target.exists() else target
    old = root / f".old-{leaving.name}"
    if leaving.exists():
        leaving.rename(old)
    if leaving != target:
        target.rename(leaving)
    folder.rename(target)
    _sync_folder(root)
    _delete(old)
    return target


def _delete(folder: Path) -> None:
    """Removes a folder; under another name, so that half of it is never taken for a checkpoint."""
    if folder.exists():
        trash = folder.with_name(f".trash-{time.time_ns()}")
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _clean_up(root: Path) -> None:
    """Finishes what a killed run, or a save that failed, left undone."""
    for old in root.glob(".old-*"):
        tier = root / old.name.removeprefix(".old-")
        if not tier.exists():
            old.rename(tier)  # killed after the old one left and before the new one came
    for pattern in (".old-*", ".writing-*", ".trash-*"):
        for folder in root.glob(pattern):
            _delete(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
# Finding and reading
# ---------------------------------------------------------------------------------------------------------------------


class _DamagedError(Exception):
    """What is wrong with a checkpoint on disk."""


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

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies every saved tensor into `tensors`, in place and bit by bit.

        UserError with a table where names, shapes or dtypes differ; then nothing has been copied.
        """
        rows = []
        for name in sorted(self.metadata.state_dict_metadata.keys() | tensors.keys()):
            saved, wanted = self.metadata.state_dict_metadata.get(name), tensors.get(name)
            here = "missing" if saved is None else _describe_tensor(saved.size, saved.properties.dtype)
            there = "missing" if wanted is None else _describe_tensor(wanted.shape, wanted.dtype)
            if here != there:
                rows.append((name, here, there))
        if rows:
            raise UserError(f"{self.path} is of another model:\n" + _table(("tensor", "checkpoint", "this run"), rows))
        self._read({name: tensor.detach() for name, tensor in tensors.items()})

    def read_tensors(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """New CPU tensors: `names`, or all of the model and none of the optimizer's."""
        import torch

        saved = self.metadata.state_dict_metadata
        wanted = [name for name in saved if name.startswith("model.")] if names is None else list(names)
        tensors = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in wanted}
        self._read(tensors)
        return tensors

    def _read(self, tensors: dict[str, torch.Tensor]) -> None:
        import torch.distributed.checkpoint as dcp

        metadata = self.metadata

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
                dcp.load(dict(tensors), storage_reader=VerifiedReader(self.path), no_dist=True)
        except (OSError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error
        if _replaced(self.path, self.manifest):
            raise UserError(f"{self.path} was replaced by a newer one while it was read: run the command again.")


def find_checkpoint(out_dir: str | Path, which: str, on_warning: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `which` asks for: latest, best, a tier's name or a folder; None if it is `latest` and there is none.

    A damaged one is named through `on_warning` and the next newest whole one is taken. UserError if `which` does not
    exist, if no checkpoint is whole, or if it was written by a newer version.
    """
    folders = _candidates(Path(out_dir) / FOLDER, which)
    for folder in folders:
        try:
            return _open(folder)
        except _DamagedError as error:
            on_warning(f"checkpoint {folder} is damaged ({error}); looking for the next newest whole one")
    if folders:
        raise UserError(f"no checkpoint in {folders[0].parent} is whole; to start from scratch, move them away")
    return None


def _candidates(root: Path, which: str) -> list[Path]:
    """The folder asked for, and behind it what to fall back to."""
    tier = {"best": "best_model"}.get(which, which)
    tiers = _tiers(root)
    if tier == "latest":
        return list(tiers.values())
    if tier not in tiers:
        path = Path(which)
        if not _is_checkpoint(path):
            saved = ", ".join(tiers) or "nothing"
            raise UserError(f"no checkpoint '{which}': neither a checkpoint's folder nor one of {root}, which holds {saved}")
        tier, tiers = path.name, _tiers(path.parent)
    asked = tiers.pop(tier)
    return [asked, *tiers.values()]


def _is_checkpoint(folder: Path) -> bool:
    """Whether this is a checkpoint, whole or damaged. (A dataset has a manifest.json, too.)"""
    return any((folder / name).exists() for name in ("state.json", ".metadata", "__0_0.distcp"))


def _tiers(root: Path) -> dict[str, Path]:
    """The checkpoints in `root`: latest, latest_backup, then by the time they were saved, newest first."""
    folders = {path.name: path for path in root.glob("[!.]*") if _is_checkpoint(path)}
    for old in root.glob(".old-*"):  # a writer is, or was killed, between two renames
        folders.setdefault(old.name.removeprefix(".old-"), old)

    def rank(tier: str) -> tuple[bool, bool, str]:
        try:
            saved_at = _read_manifest(folders[tier])["saved_at"]
        except (_DamagedError, UserError):
            saved_at = ""
        return tier == "latest", tier == "latest_backup", saved_at

    return {tier: folders[tier] for tier in sorted(folders, key=rank, reverse=True)}


def _open(folder: Path) -> Checkpoint:
    """A verified checkpoint. A running writer may put a newer one in its place meanwhile: then that one, from the start."""
    manifest = _read_manifest(folder)
    try:
        _check_files(folder, manifest, _sha256)
        state = json.loads((folder / "state.json").read_bytes())
        metadata = _read_metadata(folder, manifest)
    except _DamagedError:
        if not _replaced(folder, manifest):
            raise
    else:
        if not _replaced(folder, manifest):
            return Checkpoint(folder, manifest, state, metadata)
    return _open(folder)


def _replaced(folder: Path, manifest: dict[str, Any]) -> bool:
    return _read_manifest(folder)["manifest_sha256"] != manifest["manifest_sha256"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["manifest_sha256"] != _manifest_digest(manifest):
            raise _DamagedError("manifest.json does not match its own checksum")
        version = manifest["format_version"]
    except FileNotFoundError:
        raise _DamagedError("manifest.json is missing") from None
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise _DamagedError(f"manifest.json cannot be read: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}: use the newer program")
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any], digest: Callable[[IO[bytes]], str] | None) -> None:
    """Compares every file with the manifest: its size, and its checksum if `digest` is there to compute it."""

    def check(name: str) -> None:
        entry = manifest["files"][name]
        with (folder / name).open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes != entry["bytes"]:
                raise _DamagedError(f"{name} has {n_bytes:,} bytes, not {entry['bytes']:,}")
            if digest is not None and digest(file) != entry["sha256"]:
                raise _DamagedError(f"{name} does not match its checksum")

    try:
        with ThreadPoolExecutor(MAX_FILES) as pool:
            list(pool.map(check, manifest["files"]))
    except FileNotFoundError as error:
        raise _DamagedError(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise _DamagedError(str(error)) from None


def _sha256(file: IO[bytes], on_bytes: Callable[[int], Any] = lambda n_bytes: None) -> str:
    sha256 = hashlib.sha256()
    while chunk := file.read(HASH_CHUNK_BYTES):
        sha256.update(chunk)
        on_bytes(len(chunk))
    return sha256.hexdigest()


def _size(manifest: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


# All that DCP's metadata of tensors is made of, but for dtypes.
METADATA_CLASSES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks up torch.strided and its like by name
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds plain records of tensors and nothing else, so that no code of the file's choice can run."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in METADATA_CLASSES:
            raise _DamagedError(f".metadata asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _read_metadata(folder: Path, manifest: dict[str, Any]) -> Metadata:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except _DamagedError:
        raise
    except Exception as error:  # a pickle can fail in any way
        raise _DamagedError(f".metadata cannot be read: {error}") from None
    if not isinstance(metadata, Metadata) or any(
        not isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()
    ):
        raise _DamagedError(".metadata lists something that is no tensor")
    for info in metadata.storage_data.values():
        if info.relative_path not in manifest["files"] or getattr(info, "transform_descriptors", None):
            raise _DamagedError(f".metadata points to {info.relative_path}, which is not in the manifest")
    return metadata


def _describe_tensor(shape: Iterable[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], limit: int = 10) -> str:
    """Aligned columns; at most `limit` rows, and how many more there are."""
    shown = [header, *rows[:limit]]
    widths = [max(len(row[column]) for row in shown) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    if len(rows) > limit:
        lines.append(f"... and {len(rows) - limit} more")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Before a run: is this out_dir ours, and is there room?
# ---------------------------------------------------------------------------------------------------------------------


def lock_out_dir(out_dir: str | Path) -> IO[str]:
    """Makes `out_dir` this process's alone for as long as the returned file is open; the lock dies with the process.

    UserError if another run holds it, or if it cannot be written.
    """
    path = Path(out_dir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError as error:
        raise UserError(f"out_dir {out_dir} cannot be written ({error.strerror}): choose another with --out_dir=...") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        handle.close()
        raise UserError(f"out_dir {out_dir} is in use by {owner}: choose another with --out_dir=...") from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    return handle


def set_aside(out_dir: str | Path) -> str | None:
    """Moves an earlier run's checkpoints out of the way of a run from scratch; returns a line that says so."""
    root = Path(out_dir) / FOLDER
    tiers = _tiers(root)
    if not tiers:
        return None
    name = "unnamed"
    for folder in tiers.values():
        with contextlib.suppress(_DamagedError, UserError):
            name = re.sub(r"[^\w.-]", "_", str(_read_manifest(folder)["run_name"]))
            break
    aside = root.with_name(f"{FOLDER}.{name}")
    number = 2
    while aside.exists():
        aside = root.with_name(f"{FOLDER}.{name}.{number}")
        number += 1
    root.rename(aside)
    return f"Starting from scratch: the checkpoints of run {name} are now in {aside}"


def check_free_space(out_dir: str | Path, checkpoint_bytes: int, cfg: CheckpointConfig) -> str | None:
    """A warning if the disk cannot hold all tiers that `cfg` asks for; UserError if it cannot hold two checkpoints.

    What is in out_dir/checkpoints already counts as room, for it will be replaced.
    """
    files = [path.stat() for path in (Path(out_dir) / FOLDER).rglob("*") if path.is_file()]
    room_bytes = shutil.disk_usage(out_dir).free + sum({status.st_ino: status.st_size for status in files}.values())
    copies = 4  # latest, latest_backup, best_model and the one that is being written
    if cfg.always_save_checkpoint:
        copies += (cfg.keep_rolling if cfg.rolling_interval else 0) + cfg.keep_epochs
    if room_bytes >= copies * checkpoint_bytes:
        return None
    room = f"{out_dir} has room for {room_bytes:,} bytes, and a checkpoint takes {checkpoint_bytes:,}"
    if room_bytes < 2 * checkpoint_bytes:
        raise UserError(f"{room}: not even two fit. Free some space or choose another place with --out_dir=...")
    return (
        f"{room}; all tiers together may need {copies * checkpoint_bytes:,} (--keep_rolling and --keep_epochs say how many stay)"
    )


def check_compatible(state: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
    """Compares sections of a checkpoint's state ("model", "data") with this run's. UserError with a table of what differs."""
    rows = []
    for section, values in expected.items():
        saved = state.get(section, {})
        for knob in sorted(saved.keys() | values.keys()):
            before, now = saved.get(knob, "(none)"), values.get(knob, "(none)")
            if before != now:
                rows.append((knob, str(before), str(now)))
    if rows:
        raise UserError(
            "the checkpoint does not fit this run:\n" + _table(("knob", "checkpoint", "this run"), rows, limit=len(rows))
        )


# ---------------------------------------------------------------------------------------------------------------------
# python checkpoint.py list | verify | inspect
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="checkpoint.py", description="What checkpoints are on disk, and are they whole?")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("list", "a table of the checkpoints; compares file sizes only"),
        ("verify", "the same, comparing every checksum; exit code 1 if a checkpoint is damaged"),
        ("inspect", "state and tensors of one checkpoint, or of the latest"),
    ):
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("path", nargs="?", default="out", help="an out_dir, its folder of checkpoints, or one checkpoint")
        command.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    tiers = _resolve(Path(args.path))
    if args.command == "inspect":
        print_checkpoint(next(iter(tiers.values())), args.json)
        return 0
    rows = verify(tiers) if args.command == "verify" else [_row(tier, folder, None) for tier, folder in tiers.items()]
    print_rows(rows, args.json)
    return int(args.command == "verify" and any(row["damage"] for row in rows))


def _resolve(path: Path) -> dict[str, Path]:
    """The checkpoints that a path on the command line means: tier -> folder."""
    tiers = {path.name: path} if _is_checkpoint(path) else _tiers(path / FOLDER) or _tiers(path)
    if not tiers:
        raise UserError(f"no checkpoints in {path}: name an out_dir, its folder of checkpoints, or one checkpoint")
    return tiers


def _row(tier: str, folder: Path, digest: Callable[[IO[bytes]], str] | None) -> dict[str, Any]:
    """What `list` and `verify` show of a checkpoint; `damage` is None if it is whole."""
    row: dict[str, Any] = dict.fromkeys(("run_name", "iter", "val_loss", "saved_at", "bytes", "damage"))
    try:
        manifest = _read_manifest(folder)
        row |= {name: manifest[name] for name in row.keys() & manifest.keys()} | {"bytes": _size(manifest)}
        _check_files(folder, manifest, digest)
    except (_DamagedError, UserError) as error:
        row["damage"] = str(error)
    return {"tier": tier, "path": str(folder), **row}


def verify(tiers: dict[str, Path]) -> list[dict[str, Any]]:
    """A row for each checkpoint, every file read once however many tiers share it."""
    from tqdm import tqdm

    digests: dict[int, str] = {}  # by inode
    with tqdm(unit="B", unit_scale=True, desc="verify") as bar:

        def digest(file: IO[bytes]) -> str:
            inode = os.fstat(file.fileno()).st_ino
            if inode not in digests:
                digests[inode] = _sha256(file, bar.update)
            return digests[inode]

        return [_row(tier, folder, digest) for tier, folder in tiers.items()]


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    formats = {"iter": "{}", "val_loss": "{:.4f}", "bytes": "{:,}", "saved_at": "{:.19}"}
    cells = [
        (
            row["tier"],
            *("-" if row[name] is None else form.format(row[name]) for name, form in formats.items()),
            row["damage"] or "yes",
        )
        for row in rows
    ]
    print(_table(("tier", "step", "val loss", "bytes", "saved (UTC)", "whole"), cells, limit=len(cells)))


def print_checkpoint(folder: Path, as_json: bool) -> None:
    try:
        checkpoint = _open(folder)
    except _DamagedError as error:
        raise UserError(f"{folder} is damaged: {error}") from None
    saved = checkpoint.metadata.state_dict_metadata
    tensors = {name: _describe_tensor(entry.size, entry.properties.dtype) for name, entry in saved.items()}
    document = {"path": str(folder), "manifest": checkpoint.manifest, "state": checkpoint.state, "tensors": tensors}
    if as_json:
        print(json.dumps(document, indent=1))
        return
    print(
        f"{folder}\n\nmanifest\n{json.dumps(checkpoint.manifest, indent=1)}\n\nstate\n{json.dumps(checkpoint.state, indent=1)}\n"
    )
    print(_table(("tensor", "dtype and shape"), list(tensors.items()), limit=len(tensors)))


if __name__ == "__main__":
    run_command(main)
