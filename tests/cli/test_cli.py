from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml

import gfnode_fast
from gfnode_fast.cli import commands, console, data_commands
from gfnode_fast.cli.main import main
from gfnode_fast.training import (
    NonFiniteLossError,
    TrainConfig,
    TrainEvent,
    config_from_dict,
    config_to_dict,
    load_model,
)
from small_run import small_config


@pytest.fixture
def config_file(trajectory_file, tmp_path):
    path = tmp_path / "config.yaml"
    config = small_config(trajectory_file, tmp_path / "run")
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    return path


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_train_from_a_file_and_the_command_line_beats_it(config_file, tmp_path, capsys):
    assert main(["train", "--config", str(config_file), "--optim.epochs", "2"]) == 0
    output = capsys.readouterr().out
    assert "training completed: 4 steps, 2 epochs" in output
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["optim"]["epochs"] == 2
    assert stored["model"]["hidden_nf"] == 8


def test_resume(config_file, tmp_path, capsys):
    arguments = ["train", "--config", str(config_file)]
    assert main([*arguments, "--max_steps", "3"]) == 0
    said = capsys.readouterr().out
    assert "training stopped at max_steps: 3 steps, 1 epochs" in said
    assert "step 3/3" in said
    assert f"go on with: gfnode-fast train --resume {tmp_path / 'run'} --max_steps null" in said
    assert main(arguments) == 2
    assert "must not hold a run already" in one_line(capsys)
    run = str(tmp_path / "run")
    assert main(["train", "--optim.lr", "1", "--resume", run]) == 2
    assert "optim.lr: 0.001 -> 1.0" in one_line(capsys)
    assert main(["train", "--resume", run, "--max_steps", "5"]) == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["train", "--resume", str(moved), "--max_steps", "null"]) == 0
    assert "training completed: 12 steps" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["fly"], "fly"),
        (["train", "--optim.lrr", "1"], "optim.lrr"),
        (["train", "--optim.lr", "fast"], "optim.lr"),
        (["train", "--optim.lr", "-1"], "`optim.lr` must be a finite number > 0"),
        (["train", "--data.sampling", "odd"], "sampling"),
        (["train", "--data.trajectory", "nowhere.npz"], "nowhere.npz"),
        (["train", "--data.trajectory", "sample:water"], "water"),
        (["train", "--resume", "nowhere"], "`resume` must be the directory of a run"),
        (["predict", "nowhere", "--times", "soon"], "`times` must be whole numbers"),
        (["predict", "nowhere", "--dt_fs", "1"], "`dt_fs` must be left out without `trajectory`"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "nowhere", "--spilt", "test"], "spilt"),
        (["predict", "nowhere", "--output", "x.pdb"], "must end in .extxyz"),
        (["predict", "nowhere", "--output", "no/x.xyz"], "`output` must be in a directory that"),
        (["check", "nowhere.pt"], "nowhere.pt"),
        (["data"], "subcommand"),
        (["data", "inspect", "nowhere.npz"], "nowhere.npz"),
        (["data", "simulate", "--frames", "10"], "smiles"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_in_a_file_is_refused(config_file, capsys):
    values = yaml.safe_load(config_file.read_text())
    values["optim"]["learning_rate"] = 1.0
    config_file.write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(config_file)]) == 2
    assert "learning_rate" in one_line(capsys)


def test_print_config_round_trip(tmp_path, capsys):
    arguments = ["train", "--optim.lr", "0.5", "--data.rigid_bonds", "[[0, 1]]", "--print_config"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code in (0, None)
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "c.yaml"), "--print_config"])
    assert capsys.readouterr().out == printed
    values = yaml.safe_load(printed)
    assert values.pop("resume") is None
    config = config_from_dict(values)
    assert config.optim.lr == 0.5
    assert config.data.rigid_bonds == [(0, 1)]
    assert config.model == TrainConfig().model


def test_a_defect_keeps_its_traceback(config_file, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(commands, "train", broken)
    with pytest.raises(ValueError, match="shapes do not match"):
        main(["train", "--config", str(config_file)])


def test_a_non_finite_loss_is_code_1(config_file, monkeypatch, capsys):
    def diverge(*args, **kwargs):
        raise NonFiniteLossError("train: `loss` must be finite, got nan at step 3; lower optim.lr")

    monkeypatch.setattr(commands, "train", diverge)
    assert main(["train", "--config", str(config_file)]) == 1
    assert "step 3" in one_line(capsys)


def test_evaluate(finished_run, tmp_path, capsys):
    output = tmp_path / "report"
    assert main(["evaluate", str(finished_run), "--output", str(output), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    for name in ("GF-NODE", "nothing moves", "x + v t", "mean structure", "bond lengths"):
        assert name in table
    assert "window 5/5" in table
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((output / "report.json").read_text())
    assert main(["evaluate", str(finished_run), "--output", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stored


def test_evaluate_writes_beside_the_checkpoint_by_default(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "copy")
    assert main(["evaluate", str(run), "--split", "val"]) == 0
    assert (run / "report.png").exists()


def test_predict(finished_run, tmp_path, capsys):
    path = tmp_path / "p.extxyz"
    arguments = ["predict", str(finished_run), "--output", str(path), "--device", "cpu"]
    assert main([*arguments, "--start", "10,390", "--times", "1,5,9,15,20"]) == 0
    assert "10 frames" in capsys.readouterr().out
    predicted = ase.io.read(path, index=":")
    true = ase.io.read(tmp_path / "p_true.extxyz", index=":")
    assert [len(predicted), len(true)] == [10, 8]  # frames 405 and 410 are not in the file
    assert predicted[4].info == {"start_frame": 10, "frame": 30, "time_fs": 10.0}
    assert true[4].info == predicted[4].info
    assert np.abs(predicted[0].positions - true[0].positions).max() < 1.0


def test_predict_by_default_starts_from_the_first_test_window(finished_run, tmp_path, capsys):
    path = tmp_path / "p.extxyz"
    assert main(["predict", str(finished_run), "--output", str(path)]) == 0
    assert [f.info["time_fs"] for f in ase.io.read(path, index=":")] == [2.5, 5.0, 7.5, 10.0]
    assert "mean squared error per coordinate" in capsys.readouterr().out


def test_predict_from_another_file(finished_run, trajectory_file, tmp_path, capsys):
    arguments = ["predict", str(finished_run), "--output", str(tmp_path / "p.extxyz")]
    assert main([*arguments, "--trajectory", str(trajectory_file), "--times", "30"]) == 2
    assert "`times` must be whole frames in 1 ... 20" in one_line(capsys)
    assert main([*arguments, "--trajectory", str(trajectory_file)]) == 0


def test_check_a_published_file(finished_run, trajectory_file, tmp_path, capsys):
    state = load_model(finished_run, device="cpu").model.state_dict()
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    arguments = [
        "check", str(tmp_path / "x.pt"), "--trajectory", str(trajectory_file), "--device", "cpu",
        "--delta_frame", "20", "--num_timesteps", "4", "--batch_size", "3",
    ]  # fmt: skip
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "hidden_nf=8" in output
    assert "they agree" in output
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_info(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["torch"] == torch.__version__


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"gfnode-fast {gfnode_fast.__version__}\n"


def test_inspect(trajectory_file, capsys):
    assert main(["data", "inspect", str(trajectory_file)]) == 0
    assert "consecutive: yes" in capsys.readouterr().out
    assert main(["data", "inspect", str(trajectory_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_frames"] == 400
    assert main(["data", "inspect", "sample:ethanol", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_frames"] == 100_000
    assert main(["data", "inspect", "sample:water"]) == 2
    assert "must be one of aspirin, ethanol, got 'water'" in one_line(capsys)


def test_spectrum(trajectory_file, tmp_path, capsys):
    picture = tmp_path / "spectrum.png"
    arguments = ["data", "spectrum", str(trajectory_file), "--output", str(picture)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 atoms, 6 directed edges"
    assert [line.split() for line in lines[2:4]] == [
        ["0.000000", "0", "1", "1"], ["3.000000", "1", "2", "3"],
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--json"]) == 0
    found = capsys.readouterr().out
    assert json.loads(found)["eigenspaces"][1]["modes"] == 2
    # A graph needs no time between frames; one that contradicts the file is still refused.
    silent = tmp_path / "silent.npz"
    with np.load(trajectory_file) as arrays:
        np.savez(silent, R=arrays["positions"], z=arrays["numbers"])
    assert main([*arguments[:2], str(silent), *arguments[3:], "--json"]) == 0
    assert capsys.readouterr().out == found
    assert main([*arguments, "--dt_fs", "1"]) == 2
    assert "`dt_fs` must agree with the 0.5 fs" in one_line(capsys)


def test_sweep_modes(config_file, tmp_path, capsys):
    output = tmp_path / "sweep"
    arguments = ["sweep-modes", "--config", str(config_file), "--output", str(output)]
    assert main([*arguments, "--modes", "1,2,3"]) == 0
    said = capsys.readouterr().out
    assert "\n3 modes\n" in said
    lines = [line.split() for line in said.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in ("1", "2", "3")}
    assert rows["2"][1:4] == ["cuts", "an", "eigenspace"]
    found = json.loads((output / "sweep.json").read_text())["results"]
    assert [r["num_modes"] for r in found] == [1, 2, 3]
    assert [r["gap"] is None for r in found] == [False, False, True]
    assert all(r["mse"] > 0 and r["step_seconds"] > 0 and r["steps"] == 12 for r in found)
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    before = (output / "modes-1" / "metrics.csv").read_bytes()
    assert main([*arguments, "--modes", "1"]) == 0  # what is there is not trained again
    assert (output / "modes-1" / "metrics.csv").read_bytes() == before
    again = json.loads((output / "sweep.json").read_text())["results"]
    assert again == found[:1]
    capsys.readouterr()
    assert main([*arguments, "--modes", "1,4"]) == 2
    assert "`modes` must be different numbers from 1 to 3" in one_line(capsys)


def test_bench(config_file, capsys):
    arguments = ["bench", "--config", str(config_file), "--seconds", "0.01"]
    assert main([*arguments, "--batch_sizes", "2,60"]) == 0
    lines = capsys.readouterr().out.splitlines()
    timed, said = lines[:-4], lines[-4:]
    assert all("samples/s" in line for line in timed)
    assert ["published model" in line for line in timed].index(True) == 0
    for size in ("2", "60"):
        rows = [line for line in timed if line.split()[2] == size]
        assert sum("published model" in row for row in rows) == (size == "2")
        for setting in ("as configured", "backend=torch", "solver_mode=exact", "recompute=true"):
            assert any(setting in row for row in rows), setting
        assert f"batches of {size}: OMP_NUM_THREADS=1 gfnode-fast train --optim.batch_size" in (
            "\n".join(said)
        )
    assert said[2].startswith("most samples a second: batches of ")
    assert said[3].startswith("not timed: model.backend=compiled")
    assert main([*arguments, "--batch_sizes", "0"]) == 2
    assert "`batch_sizes` must be at least 1" in one_line(capsys)
    for seconds in ("-1", "0"):
        assert main([*arguments, "--batch_sizes", "2", "--seconds", seconds]) == 2
        assert "`seconds` must be positive" in one_line(capsys)


def test_bench_says_what_cannot_run(config_file, capsys):
    arguments = ["bench", "--config", str(config_file), "--seconds", "0.01", "--batch_sizes", "2"]
    assert main([*arguments, "--model.backend", "cpp", "--optim.dtype", "float64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "samples/s" in lines[0]  # the published model
    assert "float64" in lines[1]
    assert "samples/s" not in lines[1]
    assert lines[-2].startswith("batches of 2: ")
    assert "--model.backend" in lines[-2]


def test_simulate_passes_its_options(monkeypatch, capsys):
    asked = {}

    def fake(smiles, frames, path, *, progress, **options):
        asked.update(options, smiles=smiles, frames=frames, path=path)
        progress(5, 10)
        raise RuntimeError("simulate: `tblite` must be installed, got an ImportError; install it")

    monkeypatch.setattr(data_commands, "simulate", fake)
    arguments = ["data", "simulate", "--smiles", "CCO", "--frames", "10", "--output", "x.npz"]
    assert main([*arguments, "--temperature_K", "300"]) == 2
    assert "`tblite` must be installed" in capsys.readouterr().err
    assert (asked["smiles"], asked["frames"], asked["path"]) == ("CCO", 10, "x.npz")
    assert asked["temperature_K"] == 300.0


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.training_progress() as progress:
        for step in range(10):
            progress(TrainEvent("train", step, 10, 0, {"loss": 0.5}))
        progress(TrainEvent("end", 10, 10, 1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0/10  epoch 0  loss 0.5000"
    assert lines[-1] == "step 10/10  epoch 1  loss 0.5000"
    assert len(lines) == 5


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.training_progress() as progress:
        progress(TrainEvent("train", 5, 10, 0, {"loss": 0.5}))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "5/10" in captured.err


def test_the_library_prints_nothing(config_file, tmp_path):
    script = (
        "import sys, yaml\n"
        "from dataclasses import replace\n"
        "from gfnode_fast.training import *\n"
        f"config = config_from_dict(yaml.safe_load(open({str(config_file)!r})))\n"
        "config = replace(config, model=replace(config.model, num_modes=3))\n"  # warns of 2
        "train(config); evaluate(config.output)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_core_of_training_needs_no_extra_package(config_file):
    """Importing the loop loads none of the packages that only some features need."""
    script = (
        "import sys\n"
        "import gfnode_fast.training\n"
        "loaded = {'jsonargparse', 'ase', 'matplotlib', 'safetensors'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_demo_finds_a_free_directory(tmp_path):
    assert commands._new_directory(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert commands._new_directory(tmp_path / "demo") == tmp_path / "demo-3"


def test_demo_not_below_the_baseline_is_code_1(tmp_path, trajectory_file, monkeypatch, capsys):
    from gfnode_fast.training import demo

    monkeypatch.setattr(
        demo, "demo_config", lambda output: small_config(trajectory_file, Path(output))
    )
    for required, code in ((0.9999, 1), (-1e9, 0)):
        monkeypatch.setattr(demo, "REQUIRED_IMPROVEMENT", required)
        output = tmp_path / f"demo{code}"
        assert main(["demo", "--output", str(output)]) == code
        assert (output / "report.png").exists()
        captured = capsys.readouterr()
        assert str(output / "report.png") in captured.out
        assert ("failed" in captured.err) == (code == 1)


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    """The real one, about two minutes."""
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    assert "passed" in capsys.readouterr().out
    stored = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert stored["improvement"] >= 0.10
