"""checkpoint_files.py: what is written comes back to the bit; damage is found, and no file runs code of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import checkpoint_files
from checkpoint_files import DamagedError, link_checkpoint, manifest_digest, open_checkpoint, write_checkpoint
from configurator import UserError

FILES = (".metadata", "__0_0.distcp", "state.json", "manifest.json")
ABOUT = {"run_name": "run_a", "iter": 3, "val_loss": None}


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((5, 3), float(step)), "optim.a.exp_avg": torch.full((5, 3), -float(step))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of tensors_of(3)."""
    write_checkpoint(tmp_path / "latest", tensors_of(3), '{"note": "hello"}', ABOUT)
    return tmp_path / "latest"


def sign(folder: Path) -> None:
    """Makes the manifest agree with whatever the files are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["manifest_sha256"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# What is written comes back


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5), (3, 1, 4)], ids=str)
def test_tensors_come_back_bitwise(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    n_bytes = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (n_bytes,), dtype=torch.uint8)  # NaNs with payloads included
    saved = raw.view(dtype).reshape(shape)
    write_checkpoint(tmp_path / "x", {"model.x": saved}, "{}", ABOUT)
    target = {"model.x": torch.zeros(shape, dtype=dtype)}
    open_checkpoint(tmp_path / "x").load(target)
    assert bits(target["model.x"]) == bits(saved)
    assert bits(open_checkpoint(tmp_path / "x").read_tensors()["model.x"]) == bits(saved)


def test_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "MIN_FILE_BYTES", 1000)
    tensors = {f"model.{i}": torch.randn(20 + i, 30) for i in range(20)}
    write_checkpoint(tmp_path / "x", tensors, "{}", ABOUT)
    sizes = [path.stat().st_size for path in (tmp_path / "x").glob("*.distcp")]
    assert len(sizes) == checkpoint_files.MAX_FILES and max(sizes) < 2 * min(sizes)
    read = open_checkpoint(tmp_path / "x").read_tensors()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_tensors_are_loaded_in_place(folder: Path) -> None:
    target = {name: torch.nn.Parameter(torch.zeros(3, 5).t()) for name in tensors_of(0)}
    addresses = {name: tensor.data_ptr() for name, tensor in target.items()}
    open_checkpoint(folder).load(target)
    assert all(torch.equal(target[name], tensor) for name, tensor in tensors_of(3).items())
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == addresses


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", {}, "{}", ABOUT)
    open_checkpoint(tmp_path / "x").load({})


def test_a_loss_that_is_nan_is_no_damage(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", tensors_of(1), "{}", ABOUT | {"val_loss": float("nan")})
    open_checkpoint(tmp_path / "x").load(tensors_of(0))


def test_dcp_reads_the_format(folder: Path) -> None:
    target = tensors_of(0)
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(target[name], tensor) for name, tensor in tensors_of(3).items())


def test_only_the_model_is_read_unless_asked(folder: Path) -> None:
    assert list(open_checkpoint(folder).read_tensors()) == ["model.a"]
    assert list(open_checkpoint(folder).read_tensors(["optim.a.exp_avg"])) == ["optim.a.exp_avg"]


def test_links_share_their_data(folder: Path) -> None:
    link_checkpoint(folder, folder.with_name("best_model"))
    for name in FILES:
        assert (folder / name).samefile(folder.with_name("best_model") / name)


def test_links_are_copies_where_there_are_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    copy = folder.with_name("best_model")
    link_checkpoint(folder, copy)
    assert not (folder / "__0_0.distcp").samefile(copy / "__0_0.distcp")
    assert open_checkpoint(copy).manifest == open_checkpoint(folder).manifest


def test_other_tensors_are_refused_with_a_table(folder: Path) -> None:
    target = {"model.a": torch.zeros(5, 4), "model.b": torch.zeros(2), "optim.a.exp_avg": torch.zeros(5, 3, dtype=torch.bfloat16)}
    with pytest.raises(UserError) as error:
        open_checkpoint(folder).load(target)
    rows = [line.split() for line in str(error.value).splitlines()[2:]]
    assert rows == [
        ["model.a", "float32", "[5,", "3]", "float32", "[5,", "4]"],
        ["model.b", "missing", "float32", "[2]"],
        ["optim.a.exp_avg", "float32", "[5,", "3]", "bfloat16", "[5,", "3]"],
    ]
    assert not any(tensor.any() for tensor in target.values())
    with pytest.raises(UserError, match="and 13 more"):
        open_checkpoint(folder).load({f"model.{i}": torch.zeros(1) for i in range(21)})


# Damage


@pytest.mark.parametrize("name", FILES)
def test_each_flipped_bit_is_found(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    draw = random.Random(name)
    for _ in range(40):
        position, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        (folder / name).write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        with pytest.raises(DamagedError) as error:
            open_checkpoint(folder)
            pytest.fail(f"bit {bit} of byte {position} went unnoticed")
        assert name in str(error.value)
    (folder / name).write_bytes(whole)
    assert open_checkpoint(folder).state == {"note": "hello"}


def test_a_checkpoint_that_goes_away_while_it_is_read(folder: Path) -> None:
    opened = open_checkpoint(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="replaced by a newer one"):
        opened.load(tensors_of(0))


@pytest.mark.parametrize("when", ["before its files are checked", "after"])
def test_a_checkpoint_that_is_replaced_while_it_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Then the newer one is opened, and nothing of the older one is in it."""
    newer = folder.with_name("newer")
    write_checkpoint(newer, tensors_of(4), '{"note": "newer"}', ABOUT | {"iter": 4})
    check_files = checkpoint_files.check_files

    def replace() -> None:
        if newer.exists():
            folder.rename(folder.with_name("older"))
            newer.rename(folder)

    def check_and_replace(*args: Any, **kwargs: Any) -> None:
        if when != "after":
            replace()
        check_files(*args, **kwargs)
        replace()

    monkeypatch.setattr(checkpoint_files, "check_files", check_and_replace)
    opened = open_checkpoint(folder)
    assert (opened.iter, opened.state) == (4, {"note": "newer"})


# Files with a purpose of their own


class Evil:
    """Unpickled without care, it makes a file."""

    def __init__(self, call: Callable[..., Any], *args: Any):
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.args


@pytest.mark.parametrize("make", ["os.mkdir", "builtins.eval", "builtins.getattr", "torch.load", "in the middle"])
def test_malicious_metadata_runs_nothing(folder: Path, tmp_path: Path, make: str) -> None:
    file, marker = folder / ".metadata", tmp_path / "marker"
    metadata = pickle.loads(file.read_bytes())
    evil = Evil(os.mkdir, str(marker))
    if make == "builtins.eval":
        evil = Evil(eval, f"__import__('os').mkdir({str(marker)!r})")
    elif make == "builtins.getattr":
        evil = Evil(getattr, type(metadata), "__init__")
    elif make == "torch.load":
        evil = Evil(torch.load, str(marker))
    elif make == "in the middle":
        metadata.planner_data, evil = evil, metadata
    file.write_bytes(pickle.dumps(evil))
    sign(folder)
    with pytest.raises(DamagedError, match="which no checkpoint needs"):
        open_checkpoint(folder)
    assert not marker.exists()


def test_metadata_that_was_exchanged_after_the_check_runs_nothing(folder: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(os.mkdir, str(tmp_path / "marker"))))
    assert torch.equal(opened.read_tensors()["model.a"], tensors_of(3)["model.a"])
    assert not (tmp_path / "marker").exists()


def test_a_malicious_tensor_runs_nothing(tmp_path: Path) -> None:
    folder, marker = tmp_path / "x", tmp_path / "marker"
    write_checkpoint(folder, {"model.a": torch.zeros(3)}, "{}", ABOUT)
    torch.save(Evil(os.mkdir, str(marker)), folder / "__0_0.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)
    with pytest.raises(UserError, match="cannot be read"):
        open_checkpoint(folder).load({"model.a": torch.zeros(3)})
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_an_object_in_place_of_a_tensor_is_refused(folder: Path) -> None:
    dcp.save({"model.a": "not a tensor"}, checkpoint_id=folder, no_dist=True)
    sign(folder)
    with pytest.raises(DamagedError, match=r"\.metadata"):
        open_checkpoint(folder)


def test_a_tensor_in_a_file_outside_the_checkpoint_is_refused(folder: Path) -> None:
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere.distcp"
    file.write_bytes(pickle.dumps(metadata))
    sign(folder)
    with pytest.raises(DamagedError, match=r"points to \.\./\.\./elsewhere\.distcp"):
        open_checkpoint(folder)
