"""checkpoint.py: what a run saves is found again, and nothing that happens to a machine loses it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import checkpoint as module
import checkpoint_files
from checkpoint import (
    Checkpoint,
    CheckpointStore,
    check_compatible,
    check_free_space,
    find_checkpoint,
    lock_out_dir,
    set_aside,
    tokenizer_folder,
)
from configurator import ROOT, CheckpointConfig, UserError

FILES = (".metadata", "__0_0.distcp", "state.json", "manifest.json")


class Saver:
    """A store with its reports kept, and one-line saves."""

    def __init__(self, out_dir: Path, **knobs: Any):
        self.out_dir, self.root = out_dir, out_dir / "checkpoints"
        self.saved: list[module.SavedCheckpoint] = []
        self.warnings: list[str] = []
        self.store = CheckpointStore(out_dir, CheckpointConfig(**knobs), self.saved.append, self.warnings.append)

    def __call__(self, step: int, *tiers: str, tensors: dict[str, torch.Tensor] | None = None, **state: Any) -> None:
        state = {"run_name": "run_a", "step": step} | state
        self.store.save(step, tensors_of(step) if tensors is None else tensors, state, tiers)
        self.store.wait()

    def find(self, which: str = "latest") -> Checkpoint | None:
        return find_checkpoint(self.out_dir, which, self.warnings.append)


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    return Saver(tmp_path / "out")


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((5, 3), float(step)), "optim.a.exp_avg": torch.full((5, 3), -float(step))}


# What is saved comes back


def test_parameters_and_views(saver: Saver) -> None:
    whole = torch.randn(1000, 1000)
    tensors = {"model.t": torch.nn.Parameter(torch.randn(20, 30).t()), "model.row": whole[3], "model.strided": whole[::500, ::7]}
    saver(1, "latest", tensors=tensors)
    target = {name: torch.nn.Parameter(torch.zeros(tensor.shape)) for name, tensor in tensors.items()}
    saver.find().load(target)
    assert all(torch.equal(target[name], tensors[name]) for name in tensors)
    assert saver.saved[0].bytes < 50_000  # not all of what they are views of


def test_state_comes_back(saver: Saver) -> None:
    state = {"best": 1.1 / 3, "none": None, "inf": float("inf"), "rng": "00ff", "nested": {"a": [1, 2, {"b": "ü"}]}}
    saver(7, "latest", **state)
    assert saver.find().state == {"run_name": "run_a", "step": 7} | state
    assert saver.find().iter == 7


def test_what_changes_after_save_is_not_saved(saver: Saver) -> None:
    tensors = {"model.a": torch.randn(2000, 500)}
    before, state = tensors["model.a"].clone(), {"run_name": "run_a", "list": [1]}
    stood_still_s = saver.store.save(1, tensors, state, ["latest"])
    tensors["model.a"].zero_()
    state["list"].append(2)
    saver.store.wait()
    assert torch.equal(saver.find().read_tensors()["model.a"], before)
    assert saver.find().state["list"] == [1]
    assert 0 < stood_still_s < saver.saved[0].save_s


def test_host_copies_are_reused(saver: Saver) -> None:
    saver(1, "latest")
    first = {name: copy.data_ptr() for name, copy in saver.store._host.items()}
    saver(2, "latest")
    assert {name: copy.data_ptr() for name, copy in saver.store._host.items()} == first
    saver(3, "latest", tensors={"model.a": torch.ones(9)})  # another shape, and a name less
    assert torch.equal(saver.find().read_tensors()["model.a"], torch.ones(9))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors(saver: Saver) -> None:
    tensors = {"model.a": torch.randn(3000, 3000, device="cuda"), "optim.a.step": torch.tensor(3.0, device="cuda")}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saver.store.save(1, tensors, {"run_name": "run_a"}, ["latest"])
    tensors["model.a"].zero_()
    saver.store.wait()
    assert all(copy.is_pinned() for copy in saver.store._host.values())
    saver.find().load(tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


# Tiers


def test_reports_come_on_the_callers_thread_and_only_when_asked(saver: Saver) -> None:
    saver.store.save(5, tensors_of(5), {"run_name": "run_a", "val_loss": 2.5}, ["latest", "best_model"])
    saver.store._writer.join()
    assert saver.saved == []
    saver.store.poll()
    assert [(s.tier, s.iter, s.val_loss, s.path) for s in saver.saved] == [
        (tier, 5, 2.5, saver.root / tier) for tier in ("latest", "best_model")
    ]
    files = saver.find().manifest["files"]
    assert saver.saved[0].bytes == sum((saver.root / "latest" / name).stat().st_size for name in files)


def test_latest_moves_to_latest_backup(saver: Saver) -> None:
    for step in (1, 2, 3):
        saver(step, "latest")
    assert {tier: saver.find(tier).iter for tier in ("latest", "latest_backup")} == {"latest": 3, "latest_backup": 2}
    assert sorted(path.name for path in saver.root.iterdir()) == ["latest", "latest_backup"]


def test_tiers_of_a_step_share_their_data(saver: Saver) -> None:
    saver(4, "latest", "rolling_step_4", "best_model")
    for name in FILES:
        assert len({(saver.root / tier / name).stat().st_ino for tier in ("latest", "rolling_step_4", "best_model")}) == 1


def test_old_rolling_and_epoch_checkpoints_go(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_rolling=2, keep_epochs=1)
    for step in (3000, 4000, 5000):
        saver(step, f"rolling_step_{step}", f"epoch_{step}")
    saver(1000, "rolling_step_1000")  # the run went back: what it writes now is not the oldest
    assert sorted(path.name for path in saver.root.iterdir()) == ["epoch_5000", "rolling_step_1000", "rolling_step_5000"]


def test_a_clock_that_is_set_back_does_not_make_new_checkpoints_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Saver(tmp_path, keep_rolling=2)
    save(1, "rolling_step_1")
    save(2, "rolling_step_2")

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(1970, 1, 1, tzinfo=tz)

    monkeypatch.setattr("checkpoint.datetime", Clock)
    save(3, "rolling_step_3")
    assert list(module.tiers_in(tmp_path / "checkpoints")) == ["rolling_step_3", "rolling_step_2"]


def test_half_a_deleted_checkpoint_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, keep_rolling=1)
    saver(1, "rolling_step_1")
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: (folder / "state.json").unlink())  # and then it was killed
    saver(2, "rolling_step_2")
    assert list(module.tiers_in(saver.root)) == ["rolling_step_2"]


def test_a_failure_that_is_not_the_disks_is_raised(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "write_checkpoint", fail)
    with pytest.raises(ZeroDivisionError):
        saver(1, "latest")


# Finding


def test_nothing_saved(saver: Saver) -> None:
    assert saver.find() is None
    with pytest.raises(UserError, match="which holds nothing"):
        saver.find("best")


def test_finding_by_name_and_path(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    saver(1, "latest", "best_model")
    saver(2, "latest", "rolling_step_2")
    steps = {"latest": 2, "latest_backup": 1, "best": 1, "best_model": 1, "rolling_step_2": 2}
    assert {which: saver.find(which).iter for which in steps} == steps
    assert find_checkpoint("elsewhere", str(saver.root / "best_model"), print).iter == 1
    monkeypatch.chdir(saver.root / "best_model")
    assert [find_checkpoint("elsewhere", which, print).iter for which in (".", "../rolling_step_2")] == [1, 2]
    (saver.root / "best_model" / "manifest.json").unlink()
    assert find_checkpoint("elsewhere", ".", saver.warnings.append).path.name == "latest" and len(saver.warnings) == 1
    with pytest.raises(UserError, match=r"rolling_step_3.*latest, latest_backup, rolling_step_2, best_model"):
        saver.find("rolling_step_3")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer", "zeros"])
def test_each_damaged_file_is_found(saver: Saver, name: str, damage: str) -> None:
    saver(1, "latest")
    saver(2, "latest")
    file = saver.root / "latest" / name
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": whole[:-1], "empty": b"", "longer": whole + b"}", "zeros": bytes(len(whole))}[damage])
    assert saver.find().iter == 1
    assert len(saver.warnings) == 1 and str(file.parent) in saver.warnings[0] and name in saver.warnings[0]


def test_damage_falls_back_to_the_newest_whole_one(saver: Saver) -> None:
    for step in (1, 2, 3, 4):
        saver(step, "latest", f"rolling_step_{step}")
    for step in (4, 3):  # latest and latest_backup share these files
        (saver.root / f"rolling_step_{step}" / "state.json").write_text("{}")
    assert saver.find().path.name == "rolling_step_2"
    assert saver.find("rolling_step_4").path.name == "rolling_step_2"
    for step in (2, 1):
        shutil.rmtree(saver.root / f"rolling_step_{step}", ignore_errors=True)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        saver.find()


def test_a_newer_format_is_refused_not_taken_for_damage(saver: Saver) -> None:
    saver(1, "latest")
    saver(2, "latest")
    file = saver.root / "latest" / "manifest.json"
    manifest = json.loads(file.read_text()) | {"format_version": 2}
    file.write_text(json.dumps(manifest | {"manifest_sha256": checkpoint_files.manifest_digest(manifest)}))
    with pytest.raises(UserError, match="format version 2"):
        saver.find()


def test_another_model_or_dataset_is_refused_with_a_table() -> None:
    state = {"model": {"n_layer": 2, "n_head": 4, "gone": 1}, "data": {"train": "abc"}}
    check_compatible(state, {"model": state["model"]})
    with pytest.raises(UserError) as error:
        check_compatible(state, {"model": {"n_layer": 3, "n_head": 4}, "data": {"train": "def", "vocab_size": 0}})
    *rows, last = str(error.value).splitlines()[2:]
    assert last == "repeat the flags of that run (--n_layer=2), or choose another --out_dir=..."
    assert [row.split() for row in rows] == [
        ["gone", "1", "(none)"],
        ["n_layer", "2", "3"],
        ["train", "abc", "def"],
        ["vocab_size", "(none)", "0"],
    ]


def test_of_another_dataset_only_its_name_is_told() -> None:
    def sections(dataset: str, digit: str) -> dict[str, dict[str, Any]]:
        model = {"vocab_size": int(digit), "n_layer": 2}
        return {"model": model, "data": {"dataset": dataset, "train_sha256": 32 * f"a{digit}", "vocab_size": int(digit)}}

    with pytest.raises(UserError) as error:
        check_compatible(sections("one", "1"), sections("two", "2"))
    _, _, row, last = str(error.value).splitlines()
    assert row.split() == ["dataset", "one", "two"] and "(--dataset=one)" in last
    with pytest.raises(UserError) as error:
        check_compatible(sections("one", "1"), sections("one", "2"))
    *_, row, _, last = str(error.value).splitlines()
    assert row.split() == ["train_sha256", "a1a1a1a1", "a2a2a2a2"] and "(--vocab_size=1)" in last


def test_a_knob_newer_than_the_checkpoint_had_its_default() -> None:
    state = {"model": {"n_layer": 2}}
    check_compatible(state, {"model": {"n_layer": 2, "qk_norm": False, "rope_theta": 10000.0}})
    with pytest.raises(UserError) as error:
        check_compatible(state, {"model": {"n_layer": 2, "qk_norm": True, "rope_theta": 10000.0}})
    assert str(error.value).splitlines()[2:-1] == ["qk_norm  False       True"]


def test_what_is_not_known_fits() -> None:
    check_compatible({"data": {"train_sha256": None}}, {"data": {"train_sha256": "abc"}})
    check_compatible({"data": {"train_sha256": "abc"}}, {"data": {"train_sha256": None}})


# Machines that die


def test_a_kill_between_two_renames_loses_nothing(saver: Saver) -> None:
    saver(1, "latest", "best_model")
    saver(2, "latest")
    (saver.root / "latest").rename(saver.root / ".writing-latest")  # latest had become latest_backup, the new one not latest
    (saver.root / "best_model").rename(saver.root / ".old-best_model")
    (saver.root / ".trash-1").mkdir()
    assert saver.find().path.name == "latest_backup" and saver.find("best").iter == 1
    saver(3, "latest")
    assert sorted(path.name for path in saver.root.iterdir()) == ["best_model", "latest", "latest_backup"]
    assert [saver.find(tier).iter for tier in ("latest", "best")] == [3, 1]
    assert not saver.warnings


KILL_LOOP = """
import os, random, sys, time
from pathlib import Path
import torch, torch.distributed.checkpoint
from checkpoint import CheckpointStore, find_checkpoint
from configurator import CheckpointConfig

how, out_dir, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])

def train(first_step, acknowledge, renames):
    '''Saves without end; dies by itself at the rename of that number, before or after it.'''
    rename, count = Path.rename, 0

    def counted(path, target):
        nonlocal count
        count += 1
        if count == (renames + 1) // 2 and renames % 2:
            os.kill(os.getpid(), 9)
        rename(path, target)
        if count == renames // 2:
            os.kill(os.getpid(), 9)

    if renames:
        Path.rename = counted
    report = lambda saved: os.write(acknowledge, b"%d\\n" % saved.iter)
    store = CheckpointStore(out_dir, CheckpointConfig(keep_rolling=2), report, lambda message: os._exit(9))
    for step in range(first_step, first_step + 10**6):
        tensors = {f"model.{i}": torch.full((200, 500), float(step)) for i in range(5)}
        store.save(step, tensors, {"run_name": "r"}, ["best_model", "latest", f"rolling_step_{step}"])

draw, last = random.Random(1), 0
for number in range(1, rounds + 1):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        train(last + 1, writer, number if how == "rename" else 0)
    os.close(writer)
    if how == "time":
        time.sleep(0.02 + 0.15 * draw.random())
        os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9, "the run ended by itself"
    acknowledged = [int(line) for line in os.fdopen(reader).read().split()]
    warnings = []
    if last or acknowledged:
        for which in ("best", "latest"):
            found = find_checkpoint(out_dir, which, warnings.append)
            assert all(bool((t == found.iter).all()) for t in found.read_tensors().values()), "two steps mixed"
            assert found.iter >= max(acknowledged, default=last), (which, found.iter, acknowledged, last)
        last = found.iter
    assert not warnings, warnings
print(last)
"""


@pytest.mark.parametrize(("how", "rounds"), [("time", 20), ("rename", 32)])
def test_kill_9_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path, how: str, rounds: int) -> None:
    result = run_python("-c", KILL_LOOP, how, str(tmp_path), str(rounds))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 3  # saves did get through


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system (needs root)")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("known_beforehand", [True, False])
def test_a_full_disk_is_a_warning(small_disk: Path, monkeypatch: pytest.MonkeyPatch, known_beforehand: bool) -> None:
    monkeypatch.setattr(checkpoint_files, "MIN_FILE_BYTES", 2**20)  # several files, and threads
    saver = Saver(small_disk)
    saver(1, "latest")
    if not known_beforehand:  # others fill the disk while we write
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    saver(2, "latest", tensors={f"model.{i}": torch.zeros(1_000_000) for i in range(5)})
    assert len(saver.warnings) == 1 and str(saver.root) in saver.warnings[0] and "20,000," in saver.warnings[0]
    saver(3, "latest")
    assert [saved.iter for saved in saver.saved] == [1, 3]
    assert {tier: saver.find(tier).iter for tier in ("latest", "latest_backup")} == {"latest": 3, "latest_backup": 1}
    assert sorted(path.name for path in saver.root.iterdir()) == ["latest", "latest_backup"]


def test_a_disk_that_fails_is_a_warning(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise OSError(30, "Read-only file system")

    saver(1, "latest")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_clean_up", fail)
        saver(2, "latest")
    assert len(saver.warnings) == 1 and "step 2" in saver.warnings[0] and "Read-only file system" in saver.warnings[0]
    assert saver.find().iter == 1


def test_a_reader_of_a_running_run_never_mixes_two_checkpoints(saver: Saver) -> None:
    saver(1, "latest")
    opened = saver.find()
    saver(2, "latest")
    with pytest.raises(UserError, match="replaced by a newer one"):
        opened.load(tensors_of(0))


# Before a run


def test_two_runs_on_one_out_dir(tmp_path: Path) -> None:
    hold = (
        "import sys; from checkpoint import lock_out_dir; lock = lock_out_dir(sys.argv[1], print); print(1, flush=True); input()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "out"], cwd=ROOT, stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=rf"in use by process {other.pid} on \S+"):
            lock_out_dir(tmp_path / "out", print)
        other.send_signal(signal.SIGKILL)
        other.wait()
    lock_out_dir(tmp_path / "out", print).close()
    lock_out_dir(tmp_path / "out", print).close()


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", fail)
    warnings: list[str] = []
    lock_out_dir(tmp_path / "out", warnings.append).close()
    assert "cannot be locked (Function not implemented)" in warnings[0]


def test_an_out_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*--out_dir"):
        lock_out_dir(tmp_path / "file" / "out", print)


def test_an_earlier_runs_checkpoints_are_set_aside(saver: Saver) -> None:
    assert set_aside(saver.out_dir) is None
    for number, name in enumerate(("checkpoints.run_a", "checkpoints.run_a.2", "checkpoints.run_a.3")):
        saver(number, "latest")
        (saver.out_dir / "tokenizer").mkdir()
        (saver.out_dir / "tokenizer" / str(number)).touch()
        folder = saver.out_dir / name
        line = set_aside(saver.out_dir)
        assert line == f"the checkpoints of run run_a are now in {folder} (--resume={folder / 'latest'} goes on with them)"
        assert [path.name for path in tokenizer_folder(folder).iterdir()] == [str(number)]
        assert saver.find() is None
        assert find_checkpoint(saver.out_dir, str(saver.out_dir / name / "latest"), print).iter == number


def test_an_unreadable_checkpoint_is_set_aside_too(saver: Saver) -> None:
    saver(1, "latest", run_name="../odd name")
    assert "are now in " + str(saver.out_dir / "checkpoints..._odd_name") in set_aside(saver.out_dir)
    saver(2, "latest")
    (saver.root / "latest" / "manifest.json").unlink()
    assert "checkpoints.unnamed (--resume=" in set_aside(saver.out_dir)


@pytest.mark.parametrize(
    ("free", "answer"),
    [(10_000, None), (8_999, "warning"), (2_000, "warning"), (1_999, "error")],
    ids=["all", "most", "two", "one"],
)
def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, answer: str | None) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    cfg = CheckpointConfig(keep_rolling=3, keep_epochs=2)  # and latest, its backup, the best one, the one being written: 9
    if answer == "error":
        with pytest.raises(UserError, match=r"1,999 bytes.*1,000: not even two"):
            check_free_space(tmp_path, 1000, cfg, replaces=False)
    else:
        line = check_free_space(tmp_path, 1000, cfg, replaces=False)
        assert (line is None) == (answer is None)
        assert line is None or ("9,000" in line and f"{free:,}" in line)


def test_checkpoints_that_will_be_replaced_are_room(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    saver(1, "latest", "best_model", tensors={"model.a": torch.zeros(1000)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    check_free_space(saver.out_dir, 2000, CheckpointConfig(), replaces=True)  # two of 2,000 fit where 4,000 and a little are
    with pytest.raises(UserError):
        check_free_space(saver.out_dir, 4000, CheckpointConfig(), replaces=True)  # shared files count once


# Commands


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], cwd="/", env=environment, capture_output=True, text=True, timeout=120)


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "checkpoint.py"), *map(str, args))


def test_list_and_verify(saver: Saver) -> None:
    saver(1, "latest", "best_model", val_loss=2.34567)
    saver(2, "latest", val_loss=2.34567, counters={"evaluated_step": 1})
    listed = command("list", saver.out_dir)
    header, *rows, last = [line.split() for line in listed.stdout.splitlines()]
    assert header[-1] == "sizes" and " ".join(last) == f"verify checks every byte: python checkpoint.py verify {saver.out_dir}"
    assert rows[0][3:5] == ["(step", "1)"], "its loss is of an earlier step"
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("latest", "2", "2.3457", "ok"),
        ("latest_backup", "1", "2.3457", "ok"),
        ("best_model", "1", "2.3457", "ok"),
    ]
    assert command("verify", saver.out_dir).returncode == 0
    file = saver.root / "latest" / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    assert "DAMAGED" not in command("list", saver.out_dir).stdout  # sizes only
    (saver.root / "best_model" / "state.json").unlink()
    assert "DAMAGED: state.json is missing" in command("list", saver.out_dir).stdout
    (saver.root / "best_model" / "state.json").write_text("{}")
    assert "state.json has 2 bytes, not" in command("list", saver.out_dir).stdout
    verified = command("verify", saver.root)
    assert verified.returncode == 1
    header, *lines = verified.stdout.splitlines()
    damage = {line.split()[0]: line[header.index("checksums") :] for line in lines}
    assert damage.pop("best_model").startswith("DAMAGED: state.json has 2 bytes, not ")
    assert damage == {"latest": "DAMAGED: __0_0.distcp does not match its checksum", "latest_backup": "ok"}
    (saver.root / "latest_backup" / "manifest.json").unlink()
    (line,) = (line.split() for line in command("list", saver.out_dir).stdout.splitlines() if line.startswith("latest_backup"))
    assert line[1:5] == ["-"] * 4


def test_inspect(saver: Saver) -> None:
    saver(1, "best_model", note="hello")
    saver(2, "latest", rng={"0": {"cpu": "00ff" * 2528}})
    best, latest = (json.loads(command("inspect", path).stdout) for path in (saver.root / "best_model", saver.out_dir))
    assert best["path"] == str(saver.root / "best_model") and best["manifest"]["iter"] == 1 and best["state"]["note"] == "hello"
    assert best["tensors"] == {"model.a": "float32 [5, 3]", "optim.a.exp_avg": "float32 [5, 3]"}
    assert latest["manifest"]["iter"] == 2 and latest["state"]["rng"] == {"0": {"cpu": "5,056 bytes"}}
    (saver.root / "latest" / "state.json").write_text("{}")
    damaged = command("inspect", saver.out_dir)
    assert damaged.returncode == 2 and "latest is damaged: state.json has 2 bytes" in damaged.stderr and not damaged.stdout


def test_commands_say_what_is_wrong(tmp_path: Path) -> None:
    result = command("list", tmp_path)
    assert result.returncode == 2 and "no checkpoints in" in result.stderr and "Traceback" not in result.stderr


def script(name: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A script with `echo` for its Python: what it would run."""
    environment = os.environ | {"PYTHON": "echo"}
    return subprocess.run([ROOT / "scripts" / name, *args], env=environment, capture_output=True, text=True, cwd=cwd)


def test_resume_training_without_arguments_says_how_to_call_it() -> None:
    bare = script("resume_training.sh")
    assert bare.returncode == 2 and "usage: " in bare.stderr and not bare.stdout
    assert script("resume_training.sh", "a.py", "--seed=1").stdout.endswith("train.py a.py --seed=1 --resume=latest\n")


@pytest.mark.parametrize(
    ("args", "passed_on"),
    [([], "."), (["out-a"], "out-a"), (["--port=1"], ". --port=1"), (["my runs", "--port", "1"], "my runs --port 1")],
)
def test_start_tensorboard_takes_a_folder_options_or_both(tmp_path: Path, args: list[str], passed_on: str) -> None:
    for folder in ("out-a", "my runs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "events.out.tfevents.1").touch()
    assert script("start_tensorboard.sh", *args, cwd=tmp_path).stdout == f"-m tensorboard.main --logdir {passed_on}\n"


@pytest.mark.parametrize("args", [[], ["out"], ["nowhere", "--port=1"]])
def test_start_tensorboard_without_logs_says_how_to_get_some(tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "out").mkdir()
    done = script("start_tensorboard.sh", *args, cwd=tmp_path)
    assert done.returncode == 2 and "train with --use_tensorboard" in done.stderr and not done.stdout


def test_help_is_quick() -> None:
    elapsed_s = []
    for _ in range(3):
        t0_s = time.perf_counter()
        assert "verify" in command("--help").stdout
        elapsed_s.append(time.perf_counter() - t0_s)
    assert min(elapsed_s) < 0.5


# A run in two precisions


def test_the_newest_and_the_best_of_both_folders(saver: Saver, capsys: pytest.CaptureFixture[str]) -> None:
    """latest goes by date through both folders, best by validation loss; a damaged one is passed over."""
    fp8 = CheckpointStore(saver.out_dir, CheckpointConfig(), saver.saved.append, saver.warnings.append, folder=module.FP8_FOLDER)

    def save(store: CheckpointStore, step: int, *tiers: str, val_loss: float) -> None:
        store.save(step, tensors_of(step), {"run_name": "run_a", "val_loss": val_loss}, tiers)
        store.wait()

    save(fp8, 1, "latest", "best_model", val_loss=2.0)
    save(saver.store, 2, "latest", "best_model", val_loss=3.0)
    save(fp8, 3, "latest", val_loss=4.0)
    assert saver.find().iter == 3 and saver.find("best").iter == 1
    assert [folder.parent.name for _, folder in module.checkpoints_of(saver.out_dir)][:3] == [
        "checkpoints_fp8",
        *["checkpoints"] * 2,
    ]
    (saver.out_dir / module.FP8_FOLDER / "latest" / "state.json").unlink()
    assert saver.find().iter == 2 and "checkpoints_fp8/latest is damaged" in saver.warnings[-1]
    module.main(["list", str(saver.out_dir)])
    assert "latest (fp8)" in capsys.readouterr().out
    assert " and " in module.set_aside(saver.out_dir) and saver.find() is None
