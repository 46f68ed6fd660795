"""The checkpoints of a run: published whole or not at all, in tiers, and found again whatever happened to the machine.

    out_dir/checkpoints/<tier>/     latest, latest_backup, rolling_step_N, epoch_N, best_model
    out_dir/checkpoints_fp8/<tier>/ the same of FP8 training; what asks for `latest` gets the newest of both

A checkpoint (checkpoint_files.py says what is in one) is written into `.writing-<tier>` and renamed when it is whole. Of
the checkpoints that have the name already, `latest` becomes `latest_backup` and any other `.old-<tier>` until the new one
is in place, so that at every instant what was whole is still there under a name that readers know. Tiers of one step share
their files by hard links.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import math
import os
import queue
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from checkpoint_files import (
    Checkpoint,
    DamagedError,
    Piece,
    as_pieces,
    check_files,
    is_checkpoint,
    link_checkpoint,
    open_checkpoint,
    read_manifest,
    sync,
    table,
    write_checkpoint,
)
from configurator import CheckpointConfig, ModelConfig, UserError, run_command

if TYPE_CHECKING:
    import torch

    from parallel import Ranks

FOLDER, FP8_FOLDER = FOLDERS = "checkpoints", "checkpoints_fp8"  # of out_dir
TOKENIZER_FOLDER = "tokenizer"  # beside them; all get the same ending when they are set aside
SHARED_WITHIN_S = 30.0  # what one machine has written, another must see: a network's file system may take its time


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedCheckpoint:
    """One tier that has been published."""

    iter: int
    tier: str
    path: Path
    val_loss: float | None
    bytes: int
    save_s: float  # since the call of save()
    stood_still_s: float  # what save() itself took


class CheckpointStore:
    """Writes the checkpoints of one run in the background. The caller holds `lock_out_dir`.

    `on_saved` hears of every tier that was published and `on_warning` of every failure, both from poll(), wait() and
    save(), on the caller's thread. A disk that is full or fails is a warning: training goes on.

    Several `ranks`, in a group of their own, save together: all call the same methods, each writes its own pieces, and rank 0
    publishes when all is on the disk. A rank that dies meanwhile leaves the checkpoint before.
    """

    def __init__(
        self,
        out_dir: str | Path,
        cfg: CheckpointConfig,
        on_saved: Callable[[SavedCheckpoint], None],
        on_warning: Callable[[str], None],
        ranks: Ranks | None = None,
        folder: str = FOLDER,
    ):
        self._root, self._cfg, self._ranks = Path(out_dir) / folder, cfg, ranks
        self._on_saved, self._on_warning = on_saved, on_warning
        self._host: dict[str, torch.Tensor] = {}  # host copies, reused by every save
        self._writer: threading.Thread | None = None
        self._reports: queue.SimpleQueue[SavedCheckpoint | str | BaseException] = queue.SimpleQueue()

    def save(self, iter: int, tensors: Mapping[str, torch.Tensor | Piece], state: dict[str, Any], tiers: Sequence[str]) -> float:
        """Copies `tensors` and `state` (JSON) and returns the seconds that took; a thread writes them as every one of `tiers`.

        `state["run_name"]` and, where there is one, `state["val_loss"]` with the step it was measured at are repeated in the
        manifest. Waits for the save before.
        """
        t0_s = time.perf_counter()
        self.wait()
        evaluated_step = state.get("counters", {}).get("evaluated_step")
        about = {"run_name": state["run_name"], "iter": iter, "val_loss": state.get("val_loss"), "evaluated_step": evaluated_step}
        pieces, text = self._copy_to_host(as_pieces(tensors)), json.dumps(state, indent=1)
        stood_still_s = time.perf_counter() - t0_s
        args = (pieces, text, about, tuple(tiers), (t0_s, stood_still_s))
        # Among several ranks it may wait for one that is gone: then it must not keep this process alive.
        self._writer = threading.Thread(target=self._write, args=args, name="checkpoint", daemon=self._ranks is not None)
        self._writer.start()
        return stood_still_s

    def reserve(self, tensors: Mapping[str, torch.Tensor | Piece]) -> None:
        """Begins to allocate what the first save() needs on the host: pinned memory takes a second for a few GB."""
        self._writer = threading.Thread(target=self._allocate, args=(as_pieces(tensors),), name="checkpoint", daemon=True)
        self._writer.start()

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

    def close(self, wait: bool = True) -> None:
        """wait(), and gives the host copies back; not where one of several ranks has failed, and the others never finish."""
        if wait:
            self.wait()
            self._host.clear()

    def _allocate(self, pieces: dict[str, Piece]) -> None:
        """Host copies of the pieces' shapes; those that are there are kept."""
        import torch

        on_gpu = [piece.rows.device for piece in pieces.values() if piece.rows.is_cuda]
        if on_gpu:  # a new thread stands on GPU 0, where pinning memory would cost every rank a context
            torch.cuda.set_device(on_gpu[0])
        old, self._host = self._host, {}
        for name, tensor in ((name, piece.rows) for name, piece in pieces.items()):
            copy = old.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[name] = copy

    def _copy_to_host(self, pieces: dict[str, Piece]) -> dict[str, Piece]:
        import torch

        self._allocate(pieces)
        for name, piece in pieces.items():
            self._host[name].copy_(piece.rows.detach(), non_blocking=True)
        if any(piece.rows.is_cuda for piece in pieces.values()):
            torch.cuda.synchronize()  # one wait for all copies
        return {name: replace(piece, rows=self._host[name]) for name, piece in pieces.items()}

    def _write(
        self,
        pieces: dict[str, Piece],
        state: str,
        about: dict[str, Any],
        tiers: tuple[str, ...],
        times_s: tuple[float, float],
    ) -> None:
        """The writer thread: one checkpoint under every name of `tiers`. `times_s`: when save() was called, and what it took."""
        needed_bytes = sum(math.prod(piece.shape) * piece.rows.itemsize for piece in pieces.values()) + len(state)
        try:
            folder = self._root / f".writing-{tiers[0]}"
            saved_at = self._agree(lambda: self._make_room(needed_bytes))
            about |= {"saved_at": saved_at}
            manifest = write_checkpoint(folder, pieces, state, about, self._ranks)
            if self._ranks is None or self._ranks.is_main:
                self._publish_all(folder, manifest, tiers, times_s)
        except OSError as error:
            self._reports.put(self._warning(error, about["iter"], needed_bytes))
        except BaseException as error:
            self._reports.put(error)

    def _agree(self, decide: Callable[[], str]) -> str:
        return self._ranks.agree(decide) if self._ranks else decide()

    def _make_room(self, needed_bytes: int) -> str:
        """Clears what failed saves left; returns the date for the manifest. Raises OSError where the disk is full."""
        self._root.mkdir(parents=True, exist_ok=True)
        _clean_up(self._root)
        if needed_bytes > shutil.disk_usage(self._root).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _next_saved_at(self._root)

    def _publish_all(self, folder: Path, manifest: dict[str, Any], tiers: tuple[str, ...], times_s: tuple[float, float]) -> None:
        """Gives the finished checkpoint all its names, and deletes those that are too many now."""
        published = _publish(folder, tiers[0])
        for tier in tiers:
            if tier != tiers[0]:
                linked = self._root / f".writing-{tier}"
                link_checkpoint(published, linked)
                published = _publish(linked, tier)
            save_s, stood_still_s = time.perf_counter() - times_s[0], times_s[1]
            about = manifest["iter"], tier, published, manifest["val_loss"], _size_bytes(manifest)
            self._reports.put(SavedCheckpoint(*about, save_s, stood_still_s))
        self._prune()

    def _warning(self, error: OSError, iter: int, needed_bytes: int) -> str:
        if self._ranks is None or self._ranks.is_main:
            with contextlib.suppress(OSError):  # makes room again, where the disk lets us
                _clean_up(self._root)
        what = f"checkpoint of step {iter} not saved in {self._root}: {error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what += f"; it needs {needed_bytes:,} bytes and {shutil.disk_usage(self._root).free:,} are free"
        return f"{what}. Training goes on; earlier checkpoints are untouched."

    def _prune(self) -> None:
        tiers = tiers_in(self._root)  # by the time they were saved: a run that went back to an earlier step keeps its new ones
        for prefix, keep in (("rolling_step_", self._cfg.keep_rolling), ("epoch_", self._cfg.keep_epochs)):
            for tier in [tier for tier in tiers if tier.startswith(prefix)][keep:]:
                _delete(tiers[tier])


def _size_bytes(manifest: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


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
    sync(root)
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


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def find_checkpoint(
    out_dir: str | Path, which: str, on_warning: Callable[[str], None], checksums: bool = True
) -> Checkpoint | None:
    """The checkpoint that `which` asks for: latest, best, a tier's name or a folder; None if it is `latest` and there is none.

    A damaged one (without `checksums`: in size) is named through `on_warning` and the next newest whole one is taken. UserError
    if `which` does not exist, if no checkpoint is whole, or if it was written by a newer version.
    """
    folders = _candidates(Path(out_dir), which)
    for folder in folders:
        try:
            return open_checkpoint(folder, checksums)
        except DamagedError as error:
            on_warning(f"checkpoint {folder} is damaged ({error}); looking for the next newest whole one")
    if folders:
        parents = " or ".join(sorted({str(folder.parent) for folder in folders}))
        raise UserError(f"no checkpoint in {parents} is whole; to start from scratch, move them away")
    return None


def _candidates(out_dir: Path, which: str) -> list[Path]:
    """The folder asked for, and behind it what to fall back to."""
    saved = checkpoints_of(out_dir)
    folders = [folder for _, folder in saved]
    if which == "latest":
        return folders
    named = [folder for tier, folder in saved if tier == ("best_model" if which == "best" else which)]
    if named:
        asked = min(named, key=_val_loss) if which == "best" else named[0]
    else:
        asked = Path(which).resolve()
        if not is_checkpoint(asked):
            there = ", ".join(dict.fromkeys(tier for tier, _ in saved)) or "nothing"
            raise UserError(
                f"no checkpoint '{which}': neither a checkpoint's folder nor one of {out_dir / FOLDER}, which holds {there}"
            )
        folders = list(tiers_in(asked.parent).values())
    return [asked, *(folder for folder in folders if folder != asked)]


def checkpoints_of(out_dir: Path) -> list[tuple[str, Path]]:
    """(tier, folder) of all checkpoints of a run, in the order in which `latest` takes them: newest first."""
    dated = []
    for name in FOLDERS:
        newest, entries = "", []
        for tier, folder in reversed(tiers_in(out_dir / name).items()):  # a date that cannot be read is that of the one behind it
            newest = max(newest, _manifest_if_readable(folder).get("saved_at", ""))
            entries.append((newest, tier, folder))
        dated += reversed(entries)
    return [(tier, folder) for _, tier, folder in sorted(dated, key=lambda entry: entry[0], reverse=True)]


def _val_loss(folder: Path) -> float:
    loss = _manifest_if_readable(folder).get("val_loss")
    return math.inf if loss is None else loss


def tiers_in(root: Path) -> dict[str, Path]:
    """The checkpoints in `root`: latest, latest_backup, then by the time they were saved, newest first."""
    folders = {path.name: path for path in root.glob("[!.]*") if is_checkpoint(path)}
    for old in root.glob(".old-*"):  # a writer is, or was killed, between two renames
        folders.setdefault(old.name.removeprefix(".old-"), old)
    saved_at = {tier: _manifest_if_readable(folder).get("saved_at", "") for tier, folder in folders.items()}
    newest_first = sorted(folders, key=lambda tier: (tier == "latest", tier == "latest_backup", saved_at[tier]), reverse=True)
    return {tier: folders[tier] for tier in newest_first}


def _next_saved_at(root: Path) -> str:
    """Now, or just after the newest checkpoint if the clock was set back: `saved_at` is what orders them."""
    manifests = filter(None, (_manifest_if_readable(folder) for _, folder in checkpoints_of(root.parent)))
    after = [datetime.fromisoformat(manifest["saved_at"]) + timedelta(microseconds=1) for manifest in manifests]
    return max([datetime.now(UTC), *after]).isoformat()


def _manifest_if_readable(folder: Path) -> dict[str, Any]:
    try:
        return read_manifest(folder)
    except (DamagedError, UserError):
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# Before a run: is this out_dir ours, is there room, and does the checkpoint fit?
# ---------------------------------------------------------------------------------------------------------------------


def lock_out_dir(out_dir: str | Path, on_warning: Callable[[str], None]) -> IO[str]:
    """Makes `out_dir` this process's alone for as long as the returned file is open; the lock dies with the process.

    UserError if another run holds it, or if it cannot be written. A file system without locks is a warning.
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
    except OSError as error:  # some cluster file systems have no locks
        on_warning(f"out_dir {out_dir} cannot be locked ({error.strerror}): start no other run on it")
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    return handle


def check_shared(out_dir: str | Path, ranks: Ranks) -> None:
    """UserError where `out_dir`, which rank 0 has locked, is another folder on this rank's machine: parts would go astray."""
    path = Path(out_dir) / ".lock"
    owner, deadline_s = ranks.agree(path.read_text), time.monotonic() + SHARED_WITHIN_S
    while not path.exists() or path.read_text() != owner:
        if time.monotonic() > deadline_s:
            what = f"out_dir {out_dir} is another folder on {socket.gethostname()} than for rank 0"
            raise UserError(f"{what}: choose a folder that all nodes share with --out_dir=...")
        time.sleep(0.1)


def set_aside(out_dir: str | Path) -> str | None:
    """Moves an earlier run's checkpoints and tokenizer out of the way of a run from scratch; returns a line that says so."""
    saved = [folder for _, folder in checkpoints_of(Path(out_dir))]
    if not saved:
        return None
    manifests = filter(None, map(_manifest_if_readable, saved))
    name = re.sub(r"[^\w.-]", "_", next(manifests, {"run_name": "unnamed"})["run_name"])
    roots = sorted({str(folder.parent) for folder in saved})
    together, ending, number = [*roots, str(Path(out_dir) / TOKENIZER_FOLDER)], f".{name}", 1
    while any(os.path.exists(path + ending) for path in together):
        number += 1
        ending = f".{name}.{number}"
    for path in filter(os.path.exists, together):
        os.rename(path, path + ending)
    moved, newest = " and ".join(root + ending for root in roots), Path(f"{saved[0].parent}{ending}", saved[0].name)
    return f"the checkpoints of run {name} are now in {moved} (--resume={newest} goes on with them)"


def tokenizer_folder(root: Path) -> Path:
    """Where the tokenizer of the checkpoints in `root` lies: beside checkpoints.a or checkpoints_fp8.a it is tokenizer.a."""
    _, dot, ending = root.name.partition(".")
    return root.with_name(TOKENIZER_FOLDER + dot + ending)


def most_copies(cfg: CheckpointConfig) -> int:
    """Checkpoints that may be on the disk at the same time."""
    if not cfg.save_checkpoints:
        return 0
    copies = 4  # latest, latest_backup, best_model and the one that is being written
    if cfg.always_save_checkpoint:
        copies += (cfg.keep_rolling if cfg.rolling_interval else 0) + cfg.keep_epochs
    return copies


def check_free_space(out_dir: str | Path, checkpoint_bytes: int, cfg: CheckpointConfig, replaces: bool) -> str | None:
    """A warning if the disk cannot hold all tiers that `cfg` asks for; UserError if it cannot hold two checkpoints.

    Where the run `replaces` the checkpoints in out_dir (it goes on with them, rather than setting them aside), that is room too.
    """
    roots = [Path(out_dir) / name for name in FOLDERS] if replaces else []
    files = [path.stat() for root in roots for path in root.rglob("*") if path.is_file()]
    room_bytes = shutil.disk_usage(out_dir).free + sum({status.st_ino: status.st_size for status in files}.values())
    copies = most_copies(cfg)
    if room_bytes >= copies * checkpoint_bytes:
        return None
    room = f"{out_dir} has room for {room_bytes:,} bytes, and a checkpoint takes {checkpoint_bytes:,}"
    if room_bytes < 2 * checkpoint_bytes:
        raise UserError(f"{room}: not even two fit. Free some space or choose another place with --out_dir=...")
    all_bytes = copies * checkpoint_bytes
    return f"{room}; all tiers together may need {all_bytes:,} (--keep_rolling and --keep_epochs say how many stay)"


def check_compatible(state: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
    """Compares sections of a checkpoint's state ("model", "data") with this run's. UserError with a table of what differs.

    A model knob that the checkpoint does not know, because it is newer, had the value that is its default now. None is a value
    that is not known (data without a manifest), and fits any. Of another dataset only the name is in the table.
    """
    rows, flags = [], []
    datasets = {sections["data"]["dataset"] for sections in (state, expected) if sections.get("data", {}).get("dataset")}
    for section, values in expected.items():
        defaults, saved = vars(ModelConfig()) if section == "model" else {}, state.get(section, {})
        for knob in sorted(saved.keys() | values.keys()):
            before, now = saved.get(knob, defaults.get(knob, "(none)")), values.get(knob, "(none)")
            of_dataset = knob == "vocab_size" or section == "data"
            if before == now or None in (before, now) or (len(datasets) == 2 and of_dataset and knob != "dataset"):
                continue
            length = 8 if knob.endswith(("_hash", "_sha256")) else None
            rows.append((knob, str(before)[:length], str(now)[:length]))
            if knob == "dataset" or knob in saved.keys() & defaults.keys():
                flags.append(f"--{knob}={before}")
    if rows:
        differing = table(("knob", "checkpoint", "this run"), rows)
        repeat = f"repeat the flags of that run ({' '.join(flags)})" if flags else "train on the data of that run"
        raise UserError(f"the checkpoint does not fit this run:\n{differing}\n{repeat}, or choose another --out_dir=...")


# ---------------------------------------------------------------------------------------------------------------------
# python checkpoint.py list | verify | inspect
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="checkpoint.py", description="What checkpoints are on disk, and are they whole?")
    what = "list compares file sizes; verify every checksum (exit code 1 if any is damaged); inspect prints one, as JSON"
    parser.add_argument("command", choices=("list", "verify", "inspect"), help=what)
    parser.add_argument("path", nargs="?", default="out", help="an out_dir, its folder of checkpoints, or one checkpoint")
    args = parser.parse_args(argv)
    path = Path(args.path)
    saved = [(path.name, path)] if is_checkpoint(path) else checkpoints_of(path) or list(tiers_in(path).items())
    if not saved:
        raise UserError(f"no checkpoints in {path}: name an out_dir, its folder of checkpoints, or one checkpoint")
    if args.command == "inspect":
        inspect(saved[0][1])
        return 0
    checksums = args.command == "verify"
    rows = [row_of(f"{tier} (fp8)" if folder.parent.name == FP8_FOLDER else tier, folder, checksums) for tier, folder in saved]
    print(table(("tier", "step", "val loss", "bytes", "saved (UTC)", "checksums" if checksums else "sizes"), rows))
    if not checksums:
        print(f"verify checks every byte: python checkpoint.py verify {path}")
    return int(checksums and any(row[-1] != "ok" for row in rows))


def row_of(tier: str, folder: Path, checksums: bool) -> list[str]:
    """What `list` and `verify` show of a checkpoint; the last cell is "ok" or what is wrong."""
    cells, finding = ["-"] * 4, "ok"
    try:
        manifest = read_manifest(folder)
        val_loss = "-" if manifest["val_loss"] is None else f"{manifest['val_loss']:.4f}"
        if val_loss != "-" and manifest.get("evaluated_step") not in (None, manifest["iter"]):
            val_loss += f" (step {manifest['evaluated_step']})"  # the last evaluation before it
        cells = [str(manifest["iter"]), val_loss, f"{_size_bytes(manifest):,}", manifest["saved_at"][:19]]
        check_files(folder, manifest, checksums)
    except DamagedError as error:
        finding = f"DAMAGED: {error}"
    except UserError as error:  # of a newer version
        finding = str(error)
    return [tier, *cells, finding]


def inspect(folder: Path) -> None:
    """Prints what is in a checkpoint; of tensors their shapes, of random number generators the size."""
    try:
        checkpoint = open_checkpoint(folder)
    except DamagedError as error:
        raise UserError(f"{folder} is damaged: {error}") from None
    generators = checkpoint.state.get("rng", {})  # of each rank, by device: hexadecimal
    sizes = {rank: {name: f"{len(text) // 2:,} bytes" for name, text in each.items()} for rank, each in generators.items()}
    state, tensors = checkpoint.state | {"rng": sizes}, checkpoint.describe_tensors()
    document = {"manifest": checkpoint.manifest, "state": state, "tensors": tensors}
    print(json.dumps({"path": str(folder)} | document, indent=1))


if __name__ == "__main__":
    run_command(main)
