from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

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
