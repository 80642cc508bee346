from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from forged_checkpoint import forge
from full_disk import FullDisk, no_file_larger_than
from gfnode_fast.data import WriteError
from gfnode_fast.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def write(directory, value, name="last"):
    model = {"w": torch.full((2, 3), float(value)).t()}
    state = {"optimizer.0.step": torch.tensor(float(value)), "random.cpu": torch.get_rng_state()}
    return write_checkpoint(
        directory, name, model=model, state=state, manifest={"config": {"value": value}}
    )


def test_round_trip(tmp_path):
    path = write(tmp_path, 1)
    found = read_checkpoint(path)
    assert torch.equal(found.model["w"], torch.ones(3, 2))
    assert found.manifest["config"] == {"value": 1}
    assert list(found.section("optimizer")) == ["0.step"]
    assert torch.equal(found.state["random.cpu"], torch.get_rng_state())


def test_the_model_file_is_a_plain_state_dict(tmp_path):
    write(tmp_path, 1)
    (file,) = tmp_path.glob("last-*.model.safetensors")
    assert list(load_file(file)) == ["w"]


def test_old_files_go_when_the_new_manifest_stands(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".last-0.model.safetensors.1.tmp").touch()
    write(tmp_path, 2, name="best")
    write(tmp_path, 3)
    names = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert names == ["best", "best", "best.json", "last", "last", "last.json"]


@pytest.mark.parametrize("survive", range(3))
def test_a_crash_at_any_rename_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, survive):
    write(tmp_path, 1)
    replace, calls = os.replace, []

    def crash(source, target):
        if len(calls) == survive:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    found = read_checkpoint(tmp_path / "last.json")
    assert found.manifest["config"] == {"value": 1}
    assert torch.equal(found.model["w"], torch.ones(3, 2))
    assert found.state["optimizer.0.step"] == 1
    assert not list(tmp_path.glob(".*tmp"))
    write(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 3


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_disk_full_at_any_call_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    write(tmp_path, 1)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        disk = FullDisk(patch)
        write(tmp_path, 2)
    after = contents(tmp_path)
    assert disk.calls == ["mkstemp", "write", "fsync", "replace", "fsync"] * 3
    for at in range(len(disk.calls)):
        write(tmp_path, 1)
        with monkeypatch.context() as patch:
            FullDisk(patch, at)
            with pytest.raises(WriteError, match="last.* must be .* got No space left .*; free"):
                write(tmp_path, 2)
        # The last call comes after the manifest's rename.
        assert contents(tmp_path) == (after if at == len(disk.calls) - 1 else before)


@pytest.mark.parametrize("manifest", [b"{", b"[]", None])
def test_a_full_disk_beside_a_damaged_manifest_is_said_and_nothing_is_lost(
    tmp_path, monkeypatch, manifest
):
    path = write(tmp_path, 1)
    whole = path.read_bytes()
    damaged = whole.replace(b"model.safetensors", b"model.safetensorz")  # names another file
    path.write_bytes(damaged if manifest is None else manifest)
    with monkeypatch.context() as patch:
        FullDisk(patch, at=6)  # the second file
        with pytest.raises(WriteError, match="No space left") as caught:
            write(tmp_path, 2)
    assert "Nothing was tidied up: checkpoint: `" in caught.value.__notes__[0]
    path.write_bytes(whole)
    assert read_checkpoint(path).manifest["config"] == {"value": 1}
    write(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 3


def test_files_that_may_not_grow_leave_the_old_checkpoint(tmp_path):
    """The kernel's own refusal, in the middle of every file."""
    write(tmp_path, 1)
    before = contents(tmp_path)
    for size in range(0, max(map(len, before.values())), 97):
        with no_file_larger_than(size), pytest.raises(WriteError, match=r"last.* File too large"):
            write(tmp_path, 2)
        assert contents(tmp_path) == before
        read_checkpoint(tmp_path / "last.json")


def test_a_crash_after_the_manifest_leaves_the_new_checkpoint_whole(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def crash(self, missing_ok=False):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    assert read_checkpoint(tmp_path / "last.json").model["w"][0, 0] == 2


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: flip_a_byte(next(d.glob("*.model.safetensors"))), "SHA-256"),
        (lambda d: next(d.glob("*.state.safetensors")).unlink(), "no such file"),
        (lambda d: (d / "last.json").write_text("{"), "JSON"),
        (lambda d: (d / "last.json").write_text("[]"), "another kind of file"),
        (lambda d: (d / "last.json").unlink(), "does not exist"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    path = write(tmp_path, 1)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def damaged(content):
    """Every truncation, and one flipped bit in every byte."""
    for length in range(len(content)):
        yield content[:length]
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        yield bytes(changed)


@pytest.mark.parametrize("name", ["last.json", "last-*.model.*", "last-*.state.*"])
def test_no_damage_goes_unseen(tmp_path, name):
    manifest = {"config": {"value": "x"}}
    model, state = {"w": torch.ones(2)}, {"random.cpu": torch.arange(9, dtype=torch.uint8)}
    write_checkpoint(tmp_path, "last", model=model, state=state, manifest=manifest)
    (file,) = tmp_path.glob(name)
    whole = file.read_bytes()
    for content in damaged(whole):
        file.write_bytes(content)
        if content == whole[:-1] and name == "last.json":  # its last newline says nothing
            assert read_checkpoint(tmp_path).manifest["config"] == manifest["config"]
            continue
        with pytest.raises(CheckpointError, match=r"`.*last.*` must be .*, got .*; restore"):
            read_checkpoint(tmp_path)


class _Code:
    def __reduce__(self):
        return (Path.touch, (Path("broken-into"),))


def foreign_files():
    packed = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(2)}, "code": _Code()}, packed)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", pickle.dumps(_Code()))
    other = safetensors.torch.save({"another.weight": torch.ones(2)})
    return [pickle.dumps(_Code()), packed.getvalue(), archive.getvalue(), other, b"\x89HDF\r\n"]


@pytest.mark.parametrize("content", foreign_files())
def test_foreign_files_are_refused_and_their_code_never_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    path = write(Path("run"), 1)
    for file in ("run/last.json", "model.pt"):
        stood = Path(file).read_bytes() if Path(file).exists() else b""
        Path(file).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"must be JSON, got"):
            read_checkpoint(file)
        Path(file).write_bytes(stood)
    forge(path, "model", content)
    if b"another.weight" in content:
        model = torch.nn.ParameterDict({"w": torch.zeros(3, 2)})
        message = r"`run/last-.*model.* must be of .* 'w' as float32 of .*got none of that name"
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint("run").load_weights(model)
    else:
        with pytest.raises(CheckpointError, match=r"model.* must be a safetensors file"):
            read_checkpoint("run")
    assert not Path("broken-into").exists()


def test_another_version_is_refused(tmp_path):
    path = write(tmp_path, 1)
    manifest = json.loads(path.read_text()) | {"version": 99}
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="version 99"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.pop("files"),
        lambda m: m.pop("sha256"),
        lambda m: m["files"]["model"].update(name="../elsewhere.model.safetensors"),
        lambda m: m["config"].update(value=2),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, edit):
    path = write(tmp_path, 1)
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_checkpoint(path)


def test_a_directory_means_its_best_else_its_last(tmp_path):
    with pytest.raises(CheckpointError, match="train one first"):
        find_checkpoint(tmp_path)
    write(tmp_path, 1)
    assert find_checkpoint(tmp_path).name == "last.json"
    write(tmp_path, 1, name="best")
    assert find_checkpoint(tmp_path).name == "best.json"
