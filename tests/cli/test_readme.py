"""What README.md tells users to type, out of README.md itself."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase.neighborlist import natural_cutoffs, neighbor_list

from gfnode_fast.cli import main as command_line
from gfnode_fast.cli.main import main
from gfnode_fast.training.extxyz import write_extxyz
from gfnode_fast.training.metrics import MetricsLog
from run_comparison import assert_same_run
from small_run import chain_trajectory, small_trajectory

README = Path(__file__).parents[2] / "README.md"

pytestmark = pytest.mark.skipif(
    not README.is_file(), reason="the tests run away from the source tree"
)


def section(title: str) -> str:
    return README.read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def indented_commands(text: str) -> list[list[str]]:
    lines = re.findall(r"^ {4}(gfnode-fast .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def options(text: str) -> list[list[str]]:
    """Arguments of every command and, as arguments of `train`, every option in `text`."""
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = indented_commands(text)
    for words in map(shlex.split, inline):
        if words[0] == "gfnode-fast":
            found.append(words[1:])
        elif words[0] == "torchrun":
            found.append(words[words.index("gfnode_fast.cli") + 1 :])
        elif words[0].startswith("--") and words[0] != "--print_config":  # which ends the process
            found.append(["train", *words])
    return [[word for word in words if word != "..."] for words in found]


def test_every_command_and_option_parses() -> None:
    parser, _ = command_line._parser()
    found = options(README.read_text())
    subcommands = {words[0] for words in found}
    assert {"train", "evaluate", "predict", "check", "data", "sweep-modes", "bench", "info"} <= (
        subcommands
    )
    for words in found:
        parser.parse_args(words)


def test_commands_have_what_extxyz_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time between frames, in every command on a trajectory that needs it."""
    monkeypatch.chdir(tmp_path)
    for name, molecule in (
        ("run", chain_trajectory(600)),
        ("aspirin", chain_trajectory(600)),
        ("ethanol", small_trajectory(600)),
    ):
        infos = [{}] * molecule.num_frames
        write_extxyz(f"{name}.extxyz", molecule.positions, molecule.numbers, infos=infos)
    small = {**SMALL, "data": {**SMALL["data"], "delta_frame": 20}, "max_steps": 1}
    Path("small.yaml").write_text(yaml.safe_dump(small))
    found = [words for words in options(section("Train on your own trajectory")) if len(words) > 2]
    (spectrum,) = (words for words in found if words[:2] == ["data", "spectrum"])
    (sweep,) = (words for words in found if words[0] == "sweep-modes")
    (mixed,) = (words for words in found if "--data.molecules" in words)
    (predict,) = (words for words in found if words[0] == "predict" and "--molecule" in words)
    for words in (spectrum, sweep, mixed, predict):
        assert run(words) == 0


# What makes the published recipe small enough for a test; the README's own options beat it.
SMALL = {
    "data": {"num_timesteps": 4, "delta_frame": 400, "train_size": 16, "val_size": 4,
             "test_size": 5},
    "model": {"n_layers": 1, "hidden_nf": 8, "num_modes": 3, "time_emb_dim": 4},
    "optim": {"batch_size": 4, "epochs": 10, "lr": 3e-3, "validate_every": 5},
    "log_every": 2,
    "device": "cpu",
}  # fmt: skip


def run(words: list[str]) -> int:
    """A command of the README; where it configures a run, with SMALL behind it."""
    if words[0] in ("train", "sweep-modes") and "--resume" not in words:
        words = [words[0], "--config", "small.yaml", *words[1:]]
    return main(words)


@pytest.mark.slow
def test_five_commands_from_a_trajectory_to_an_animation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    molecule = small_trajectory(3500)
    write_extxyz("run.extxyz", molecule.positions, molecule.numbers, infos=[{}] * 3500)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    block = section("Train on your own trajectory").lstrip("\n").split("\n\n")[0]
    inspect, train, resume, evaluate, predict = indented_commands(block)
    assert "--resume" in resume

    assert run(inspect) == 0
    assert "num_frames: 3500" in capsys.readouterr().out

    assert run(train) == 0
    directory = train[train.index("--output") + 1]
    whole = Path(shutil.move(directory, "whole"))
    write = MetricsLog.write

    def interrupted(self: MetricsLog, row: dict[str, object]) -> None:
        write(self, row)
        if row["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupted)
        assert run(train) == 130
    assert f"go on with: gfnode-fast {shlex.join(resume)}" in capsys.readouterr().out
    assert run(resume) == 0
    assert_same_run(whole, Path(directory))

    assert run(evaluate) == 0
    assert "nothing moves" in capsys.readouterr().out

    assert run(predict) == 0
    times = [int(time) for time in predict[predict.index("--times") + 1].split(",")]
    animation = ase.io.read(predict[predict.index("--output") + 1], index=":")
    assert [frame.info["time_fs"] for frame in animation] == [0.5 * time for time in times]
    start = animation[0].info["start_frame"]
    assert [frame.info["frame"] for frame in animation] == [start + time for time in times]
    for frame in animation:
        assert frame.symbols.get_chemical_formula() == "C2O"
        assert not frame.pbc.any()
        assert not frame.cell.any()
        assert np.isfinite(frame.positions).all()
        bonds = zip(*neighbor_list("ij", frame, natural_cutoffs(frame, mult=1.2)), strict=True)
        assert {(0, 1), (1, 2)} <= {(int(i), int(j)) for i, j in bonds}  # C-C-O, in one piece
