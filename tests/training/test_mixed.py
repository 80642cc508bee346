"""One model for several molecules: training, resume, ranks, evaluation, prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gfnode_fast.cli.main import main
from gfnode_fast.data import Trajectory
from gfnode_fast.nn import GFNODE
from gfnode_fast.spectra import spectral_gap_report
from gfnode_fast.training import (
    CheckpointError,
    ConfigError,
    DataConfig,
    GraphMismatchError,
    config_from_dict,
    config_to_dict,
    evaluate,
    load_model,
    load_models,
    predict,
    predict_from_trajectory,
    read_metrics,
    read_report,
    sweep_modes,
    train,
)
from gfnode_fast.training.checkpoint import read_checkpoint
from gfnode_fast.training.molecules import Molecules, stored_molecules
from gfnode_fast.training.problem import build_model
from gfnode_fast.training.report import MODEL
from gfnode_fast.training.trained import model_for_trajectory
from run_comparison import assert_same_run
from small_run import chain_trajectory, mixed_config, mixed_files, small_trajectory


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return mixed_files(tmp_path_factory.mktemp("trajectories"))


@pytest.fixture(scope="module")
def finished(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run; tests must not write into it."""
    output = tmp_path_factory.mktemp("mixed") / "run"
    config = mixed_config(files, output, data={"sampling_temperature": 2.0})
    result = train(config)
    assert (result.status, result.step) == ("completed", 18)
    return output


def test_the_loss_falls_and_every_molecule_has_its_error(finished):
    rows = read_metrics(finished)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    for row in rows:
        if row["kind"] == "validation":
            parts = 4 * row["val_mse/ethanol"] + 2 * row["val_mse/chain"]
            assert row["val_mse"] == pytest.approx(parts / 6, rel=1e-12)
    header = (finished / "metrics.csv").read_text().splitlines()[0]
    assert header.endswith("val_mse,val_mse_last,val_mse/ethanol,val_mse/chain")
    assert {p.name for p in finished.glob("windows*")} == {
        "windows-ethanol.json", "windows-chain.json",
    }  # fmt: skip


def test_the_checkpoint_has_every_molecules_graph_and_hashes(finished):
    stored = stored_molecules(read_checkpoint(finished / "best.json"))
    assert {name: m.num_atoms for name, m in stored.items()} == {"ethanol": 3, "chain": 5}
    assert stored["chain"].graph.numbers.tolist() == [6, 6, 7, 6, 6]
    assert {m.largest_number for m in stored.values()} == {8}
    hashes = [digest for m in stored.values() for digest in m.data_hashes.values()]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("stop", [1, 7])
def test_resumed_equals_uninterrupted(finished, files, tmp_path, stop):
    config = mixed_config(files, tmp_path / "run", data={"sampling_temperature": 2.0})
    assert train(replace(config, max_steps=stop)).status == "max_steps"
    train(config, resume=True)
    assert_same_run(finished, tmp_path / "run")


def test_parts_of_a_batch_make_the_same_update(files, tmp_path):
    whole, parts = (
        mixed_config(
            files,
            tmp_path / f"{n}",
            optim={"accumulate": n, "dtype": "float64", "ema_decay": 0.9},
            max_steps=4,
        )
        for n in (1, 2)
    )
    train(whole), train(parts)
    one, two = (read_checkpoint(tmp_path / f"{n}" / "last.json").model for n in (1, 2))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "model",
    [
        {"use_vae": True},
        {"gnn_ablation_mode": "GCN", "solver_mode": "joint", "time_mode": "posenc"},
    ],
    ids=str,
)
def test_other_models_train_and_resume(files, tmp_path, model):
    for name, stop in (("whole", None), ("parts", 4)):
        config = mixed_config(files, tmp_path / name, model=model, optim={"epochs": 2})
        if stop is not None:
            train(replace(config, max_steps=stop))
        train(config, resume=stop is not None)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gpu_follows_the_cpu(files, tmp_path, backend):
    losses = []
    for device, asked in (("cpu", "torch"), ("cuda", backend)):
        model = {"backend": asked}
        config = mixed_config(files, tmp_path / device, model=model, optim={"epochs": 2})
        train(replace(config, device=device))
        losses.append([r["loss"] for r in read_metrics(tmp_path / device) if "loss" in r])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_resume_refuses_changed_data_of_one_molecule(tmp_path):
    paths = [tmp_path / "ethanol.npz", tmp_path / "chain.npz"]
    small_trajectory().save(paths[0])
    chain_trajectory().save(paths[1])
    config = mixed_config([str(path) for path in paths], tmp_path / "run", max_steps=1)
    train(config)
    changed = chain_trajectory()
    changed.positions[0] += 1e-3
    changed.save(paths[1])
    with pytest.raises(CheckpointError, match="got another trajectory of chain"):
        train(replace(config, max_steps=None), resume=True)


def test_one_time_step_for_all(tmp_path):
    small_trajectory().save(tmp_path / "a.npz")
    chain_trajectory(dt_fs=1.0).save(tmp_path / "b.npz")
    config = mixed_config([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"one time between frames, got a 0\.5, b 1 fs"):
        train(config)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"molecules": [{"dt_fs": 1.0}]}, r"`data.molecules\[0\]` must be a trajectory.*name a"),
        ({"molecules": ["a", None]}, r"`data.molecules\[1\]` must be a trajectory"),
        ({"molecules": [{"trajectory": 3}]}, r"`data.molecules\[0\]` must be a trajectory"),
        ({"molecules": ["a", {"trajectory": "b", "delta_frame": 3}]}, "remove delta_frame"),
        ({"molecules": ["a", {"trajectory": "b", "wrong": 3}]}, "remove wrong"),
        ({"molecules": ["x/a.npz", "y/a.npz"]}, r"`data.molecules\[1\].name` must be"),
        ({"molecules": [{"trajectory": "a", "name": "1"}]}, "not a number"),
        ({"molecules": [{"trajectory": "a", "dt_fs": -1.0}]}, "`data.dt_fs` must be"),
        ({"molecules": ["a"], "trajectory": "b"}, "`data.trajectory` must be left out"),
        ({"molecules": ["a"], "sampling_temperature": 0.0}, "`data.sampling_temperature` must be"),
        ({"sampling_temperature": 2.0}, "must be 1 with one trajectory"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        config_from_dict({"data": change})


def test_a_captured_step_is_of_one_molecule():
    text = "`capture` must be false with data.molecules, got True; .* many: leave it out"
    with pytest.raises(ConfigError, match=text):
        config_from_dict({"data": {"molecules": ["a"]}, "capture": True})


def test_more_modes_than_the_smallest_molecule_has_are_refused(files, tmp_path):
    text = "at most 3 for the 3 atoms of ethanol, the smallest molecule, got 4; lower it, or leave"
    with pytest.raises(ConfigError, match=text):
        train(mixed_config(files, tmp_path / "run", model={"num_modes": 4}))


def test_options_of_one_molecule_are_its_own(files):
    config = mixed_config(files, Path("run"), data={"bonds": "published"})
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    ethanol, chain = config.data.by_molecule().values()
    assert (ethanol.train_size, chain.train_size) == (8, 3)
    assert ethanol.bonds == chain.bonds == "published"
    assert not chain.is_mixed
    tuples = DataConfig(molecules=[{"trajectory": files[1], "rigid_bonds": [(0, 1)]}])
    assert tuples.molecules[0]["rigid_bonds"] == [[0, 1]]
    assert tuples.by_molecule()["chain"].rigid_bonds == [(0, 1)]
    shared = config_from_dict({"data": {"molecules": files, "dt_fs": 0.5, "heavy_only": False}})
    assert [m.dt_fs for m in shared.data.by_molecule().values()] == [0.5, 0.5]


def test_evaluate_has_every_molecule_and_all_together(finished):
    report = evaluate(finished, split="val")
    assert list(report.molecules) == ["ethanol", "chain"]
    alone = {name: evaluate(finished, molecule=name, split="val") for name in report.molecules}
    assert alone == report.molecules
    assert evaluate(finished, molecule=1, split="val") == alone["chain"]
    assert report.num_windows == 6
    for name, value in report.mse.items():
        parts = 4 * alone["ethanol"].mse[name] + 2 * alone["chain"].mse[name]
        assert value == pytest.approx(parts / 6, rel=1e-12)
    best = min((r for r in read_metrics(finished) if "val_mse" in r), key=lambda r: r["val_mse"])
    assert report.mse[MODEL] == pytest.approx(best["val_mse"], rel=1e-5)
    assert alone["chain"].mse[MODEL] == pytest.approx(best["val_mse/chain"], rel=1e-5)
    assert (best["step"], best["val_mse/chain"]) in alone["chain"].history
    report.save(finished.parent / "report.json")
    assert read_report(finished.parent / "report.json") == report


def test_evaluate_takes_another_trajectory_of_one_molecule(finished, tmp_path):
    chain_trajectory(320).save(tmp_path / "other.npz")
    by_atoms = evaluate(finished, trajectory=tmp_path / "other.npz")
    assert (by_atoms.num_atoms, by_atoms.molecules) == (5, {})
    report = evaluate(finished, molecule="chain", trajectory=tmp_path / "other.npz")
    assert report == by_atoms
    with pytest.raises(ValueError, match="`molecule` must be one of ethanol, chain.* got '²'"):
        evaluate(finished, molecule="²", trajectory=tmp_path / "other.npz")
    with pytest.raises(GraphMismatchError, match="`numbers` must be the checkpoint's atoms"):
        evaluate(finished, molecule="ethanol", trajectory=tmp_path / "other.npz")


def test_atoms_of_no_or_of_two_molecules_leave_it_open(finished, files, tmp_path):
    chain = chain_trajectory()
    other = replace(chain, numbers=np.array([6, 6, 6, 6, 6]))
    other.save(tmp_path / "other.npz")
    none = r"got None and the atoms \[6, 6, 6, 6, 6\], those of none of them; name the one"
    with pytest.raises(ValueError, match=none):
        evaluate(finished, trajectory=tmp_path / "other.npz")
    with pytest.raises(ValueError, match=none):
        predict_from_trajectory(finished, other, [10], [3])
    models = load_models(finished)
    twice = {"a": models["chain"], "b": models["chain"]}
    with pytest.raises(ValueError, match="those of a and b; name the one"):
        model_for_trajectory(twice, files[1])


def test_each_molecule_has_its_own_hydrogens(finished, tmp_path):
    """A trajectory is read with them where the model that it may be of has them."""
    models = load_models(finished)
    kept = models["ethanol"]
    data = replace(kept.config.data, heavy_only=False)
    models["ethanol"] = replace(kept, config=replace(kept.config, data=data))
    plain = chain_trajectory()
    numbers, beside = np.append(plain.numbers, 1), plain.positions[:, :1] + 1.0
    positions = np.concatenate((plain.positions, beside), axis=1)
    Trajectory(positions=positions, numbers=numbers, dt_fs=0.5).save(tmp_path / "h.npz")
    model, frames = model_for_trajectory(models, tmp_path / "h.npz")
    assert (model.molecule, frames.num_atoms) == ("chain", 5)


def test_predict_as_the_mixed_model_does(finished, files):
    """A GFNODE with the same weights, in a batch with the other molecule."""
    models = load_models(finished)
    config = mixed_config(files, finished)
    dataset = Molecules(config).dataset("val", dtype=torch.float32, device=torch.device("cpu"))
    batch = dataset.batch(torch.arange(6))
    mixed = build_model(config, 3)
    mixed.load_state_dict(models["chain"].model.state_dict())
    assert isinstance(mixed, GFNODE)
    with torch.no_grad():
        expected = mixed(**batch.inputs())[0].numpy()
    for name, sample, atoms in (("ethanol", 0, slice(0, 3)), ("chain", 5, slice(17, 22))):
        times = batch.timeframes[sample].long()
        found = predict(models[name], batch.x[atoms], batch.v[atoms], times)
        np.testing.assert_allclose(found, expected[:, atoms], atol=1e-5)


def test_atoms_say_which_molecule_is_meant(finished):
    ase = pytest.importorskip("ase", reason="ASE is an optional package")
    chain = chain_trajectory()
    start, velocity = chain.positions[10], chain.velocities(np.array([10]))[0]
    expected = predict(load_model(finished, molecule="chain"), start, velocity, [3, 9])
    atoms = ase.Atoms(numbers=chain.numbers, positions=start)
    np.testing.assert_array_equal(predict(finished, atoms, velocity, [3, 9]), expected)
    found = predict_from_trajectory(finished, chain, [10], [3, 9])
    np.testing.assert_array_equal(found.positions[0], expected)
    with pytest.raises(ValueError, match="`molecule` must be one of ethanol, chain"):
        predict(finished, start, velocity, [3, 9])


def test_the_command_line_finds_the_molecule(finished, files, tmp_path, capsys):
    output = tmp_path / "out.extxyz"
    assert main(["predict", str(finished), "--output", str(output)]) == 2
    assert "`molecule` must be one of ethanol, chain" in capsys.readouterr().err
    elsewhere = ["--trajectory", files[1]]
    for options in (["--molecule", "1"], elsewhere):
        assert main(["predict", str(finished), *options, "--output", str(output)]) == 0
        assert output.read_text().startswith("5\n")


def test_the_command_line_keeps_the_reports_of_other_molecules(finished, files, tmp_path, capsys):
    def files_of(*names: str) -> set[str]:
        return {f"report{name}.{kind}" for name in names for kind in ("json", "png")}

    evaluate_to = ["evaluate", str(finished), "--output", str(tmp_path)]
    assert main([*evaluate_to, "--molecule", "0"]) == 0
    first = read_report(tmp_path / "report-ethanol.json")
    assert main([*evaluate_to, "--trajectory", files[1]]) == 0
    said = capsys.readouterr().out
    assert "GF-NODE on" not in said
    assert f"report: {tmp_path}/report-chain.png and {tmp_path}/report-chain.json" in said
    assert {p.name for p in tmp_path.iterdir()} == files_of("-ethanol", "-chain")
    assert main(evaluate_to) == 0
    assert "GF-NODE on" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == files_of("", "-ethanol", "-chain")
    assert (first.molecule, read_report(tmp_path / "report.json").molecule) == ("ethanol", None)
    assert read_report(tmp_path / "report.json").molecules["ethanol"] == first


def test_the_command_line_trains_a_mixture(files, tmp_path, capsys):
    molecules = f"[{files[0]}, {{trajectory: {files[1]}, train_size: 3}}]"
    options = {
        "data.molecules": molecules, "data.sampling_temperature": "2", "data.delta_frame": "20",
        "data.train_size": "4", "data.val_size": "2", "data.test_size": "2",
        "model.n_layers": "1", "model.hidden_nf": "8", "optim.epochs": "1",
        "output": str(tmp_path / "run"), "device": "cpu",
    }  # fmt: skip
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    assert main(["train", *arguments]) == 0
    said = capsys.readouterr().out
    assert "(ethanol 0." in said
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"]["molecules"][1] == {"trajectory": files[1], "train_size": 3}
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_a_sweep_over_modes_takes_a_mixture(finished, files, tmp_path):
    config = mixed_config(files, tmp_path, max_steps=1)
    all_of_ethanol, cut = sweep_modes(config, [3, 2])
    chain = stored_molecules(read_checkpoint(finished))["chain"].graph
    gap = spectral_gap_report(chain.eigenvalues, 3).gap
    assert (all_of_ethanol.cuts, all_of_ethanol.gap) == (False, pytest.approx(gap))
    assert cut.cuts
    report = evaluate(tmp_path / "modes-3")
    assert all_of_ethanol.mse == report.mse[MODEL]
    assert list(report.molecules) == ["ethanol", "chain"]
    with pytest.raises(ConfigError, match=r"from 1 to 3, the atoms of ethanol, got \[1, 4\]"):
        sweep_modes(config, [1, 4])
