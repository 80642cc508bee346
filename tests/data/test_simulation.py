"""Dynamics: exact continuation, physical checks, and a short real GFN2-xTB run."""

import dataclasses
from pathlib import Path

import ase
import numpy as np
import pytest
from ase import units
from ase.calculators.emt import EMT

from gfnode_fast.data import SimulationError, load_trajectory, simulate
from gfnode_fast.data.dynamics import (
    DynamicsRecord,
    DynamicsSettings,
    degrees_of_freedom,
    discard_state,
    run_dynamics,
)
from gfnode_fast.data.simulation import check_physics, finish

COPPER = 2.3 * np.array(
    [[0, 0, 0], [1, 0, 0], [0.5, 3**0.5 / 2, 0], [0.5, 3**0.5 / 6, (2 / 3) ** 0.5]]
)
SETTINGS = DynamicsSettings(
    system="Cu4", frames=25, temperature_K=300.0, step_fs=2.0, stride=2, equilibration=7,
    tau_fs=20.0, seed=3, checkpoint_every=10,
)  # fmt: skip


def copper():
    return ase.Atoms("Cu4", positions=COPPER)


def forgetful_emt():
    """EMT whose forces depend on how often it was called, as wave functions carried along do."""

    class Carrying(EMT):
        calls = 0

        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            self.calls += 1
            self.results["forces"] = self.results["forces"] * (1 + 1e-6 * self.calls)

    return Carrying()


class Stop(Exception):
    pass


def stop_at(step):
    def progress(done, total):
        if done == step:
            raise Stop

    return progress


def interrupted(path, settings, steps):
    for step in steps:
        with pytest.raises(Stop):
            run_dynamics(copper(), forgetful_emt, settings, path, progress=stop_at(step))
    return run_dynamics(copper(), forgetful_emt, settings, path)


@pytest.mark.parametrize("equilibration", [0, 7, 30])
@pytest.mark.parametrize("steps", [[1], [9], [10], [11], [34], [3, 13, 22, 22, 40]])
def test_a_continued_run_equals_an_uninterrupted_one(tmp_path, equilibration, steps):
    settings = dataclasses.replace(SETTINGS, equilibration=equilibration)
    whole = run_dynamics(copper(), forgetful_emt, settings, tmp_path / "a.npz")
    parts = interrupted(tmp_path / "b.npz", settings, steps)
    assert whole.positions.shape == (25, 4, 3)
    assert whole.resumed_from == 0
    # The step that was interrupted is done again from the last checkpoint.
    assert parts.resumed_from == (steps[-1] - 1) // 10 * 10
    for name in ("positions", "energies", "kinetic"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert len(np.unique(whole.kinetic)) == 25


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run_dynamics(copper(), forgetful_emt, SETTINGS, tmp_path / "a.npz")
    again = run_dynamics(
        copper(),
        forgetful_emt,
        SETTINGS,
        tmp_path / "a.npz",
        progress=stop_at(SETTINGS.total_steps),
    )
    np.testing.assert_array_equal(first.positions, again.positions)
    discard_state(tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    run_dynamics(
        copper(), forgetful_emt, SETTINGS, tmp_path / "a.npz", progress=lambda *at: seen.append(at)
    )
    assert seen == [(step, 55) for step in range(1, 56)]


def test_another_run_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(Stop):
        run_dynamics(copper(), forgetful_emt, SETTINGS, path, progress=stop_at(20))
    with pytest.raises(ValueError, match="`path` must not have the state of another run"):
        run_dynamics(copper(), forgetful_emt, dataclasses.replace(SETTINGS, seed=4), path)
    elsewhere = copper()
    elsewhere.positions[0] += 0.1
    with pytest.raises(ValueError, match="`path` must not have the state of another run"):
        run_dynamics(elsewhere, forgetful_emt, SETTINGS, path)
    state = Path(f"{path}.state.npz")
    whole = state.read_bytes()
    with np.load(state) as file:
        np.savez(state, **{**file, "rng": np.array('{"bit_generator": "PCG64"}')})
    with pytest.raises(ValueError, match=r"state\.npz with a damaged key 'rng' .*; delete it"):
        run_dynamics(copper(), forgetful_emt, SETTINGS, path)
    state.write_bytes(whole)
    Path(f"{path}.frames").write_bytes(b"")
    with pytest.raises(ValueError, match=r"`path` must have all \d+ bytes of frames"):
        run_dynamics(copper(), forgetful_emt, SETTINGS, path)


def test_positions_that_are_not_finite_name_the_step(tmp_path):
    class Broken(EMT):
        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            self.results["forces"] = self.results["forces"] * np.nan

    with pytest.raises(RuntimeError, match="`atoms` must stay finite, got NaN .* at step 1;"):
        run_dynamics(copper(), Broken, SETTINGS, tmp_path / "a.npz")


def test_the_thermostat_holds_the_internal_temperature(tmp_path):
    settings = DynamicsSettings(
        system="Cu4", frames=2500, temperature_K=300.0, step_fs=5.0, equilibration=300,
        tau_fs=25.0, seed=0, checkpoint_every=2000,
    )  # fmt: skip
    record = run_dynamics(copper(), EMT, settings, tmp_path / "a.npz")
    report = check_physics(record, settings, COPPER, copper().numbers, "a.npz")
    assert report.errors == ()
    # 250 independent samples of 6 degrees of freedom: standard error 11 K.
    assert abs(report.mean_temperature_K - 300) < 44
    assert report.fragments == 1
    # Momentum stays zero: the centre of mass does not move.
    centre = record.positions.mean(axis=1)
    assert np.abs(centre - centre[0]).max() < 1e-6
    hot = dataclasses.replace(settings, temperature_K=600.0)
    (error,) = check_physics(record, hot, COPPER, copper().numbers, "a.npz").errors
    assert "mean temperature" in error
    assert "not 600" in error


def test_degrees_of_freedom():
    assert degrees_of_freedom(COPPER) == 6
    assert degrees_of_freedom(np.array([[0.0, 0, 0], [1.2, 0, 0], [2.4, 0, 0]])) == 4
    assert degrees_of_freedom(np.array([[0.0, 0, 0], [1.0, 0, 0], [0.5, 0.8, 0]])) == 3


def made_record(change):
    """Copper at rest at the right temperature, `change`d in its last frames."""
    positions = np.repeat(COPPER[None], 40, axis=0)
    change(positions)
    kinetic = np.full(40, 0.5 * 6 * units.kB * 300.0)
    settings = dataclasses.replace(SETTINGS, frames=40)
    return DynamicsRecord(positions, np.zeros(40), kinetic, 0), settings


def leave(positions):
    positions[20:, 3] += 10.0


def stretch(positions):
    positions[30, 3, 2] += 2.0


def test_a_molecule_that_falls_apart_is_an_error_and_its_frames_are_kept(tmp_path):
    record, settings = made_record(leave)
    path = tmp_path / "a.npz"
    Path(f"{path}.frames").write_bytes(b"x")
    with pytest.raises(SimulationError, match=r"fell into 2 pieces.*a\.failed\.npz") as caught:
        finish(record, settings, COPPER, copper().numbers, path)
    assert caught.value.report.fragments == 2
    assert not path.exists()
    assert not Path(f"{path}.frames").exists()
    assert load_trajectory(tmp_path / "a.failed.npz").num_frames == 40


def test_a_stretched_bond_is_a_warning_in_report_and_metadata(tmp_path):
    record, settings = made_record(stretch)
    report = finish(record, settings, COPPER, copper().numbers, tmp_path / "a.npz")
    assert report.bond_ratio_max > 1.4
    assert len(report.warnings) == 1
    trajectory = load_trajectory(tmp_path / "a.npz")
    assert trajectory.metadata["warnings"] == list(report.warnings)
    assert trajectory.dt_fs == 4.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frames": 1}, ValueError, "`frames` must be at least 2, got 1"),
        ({"frames": 10.0}, TypeError, "`frames` must be an int"),
        ({"stride": 0}, ValueError, "`stride` must be at least 1"),
        ({"temperature_K": 0.0}, ValueError, "`temperature_K` must be positive, got 0"),
        ({"step_fs": np.nan}, ValueError, "`step_fs` must be positive"),
        ({"checkpoint_every": True}, TypeError, "`checkpoint_every` must be an int"),
    ],
)
def test_setting_refusals(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_path_refusals(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    for name, message in (
        ("a.npz", "a.npz which exists"),
        ("a.xyz", "`path` must be a new file that ends in"),
        ("no/a.npz", "`path` must be in an existing folder"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate("CCO", 10, tmp_path / name)


def need_xtb():
    pytest.importorskip("rdkit", reason="the extra simulate is not installed")
    pytest.importorskip("tblite.ase", reason="the extra simulate is not installed")


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("C(", "`smiles` must be a valid SMILES"),
        ("", "`smiles` must be a valid SMILES"),
        ("C.C", "`smiles` must be one molecule, got 'C.C' with 2 parts"),
        ("[He]", "`smiles` must have at least two atoms"),
    ],
)
def test_smiles_refusals(tmp_path, smiles, message, capfd):
    need_xtb()
    with pytest.raises(ValueError, match=message):
        simulate(smiles, 10, tmp_path / "a.npz")
    assert capfd.readouterr() == ("", "")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    def absent(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr("gfnode_fast.data.require.import_module", absent)
    with pytest.raises(RuntimeError, match=r"pip install gfnode-fast\[simulate\]"):
        simulate("CCO", 10, tmp_path / "a.npz")


def test_a_real_run_of_water_continues_exactly(tmp_path, capfd):
    need_xtb()
    options = {"equilibration": 60, "checkpoint_every": 40, "temperature_K": 300.0, "seed": 1}
    report = simulate("O", 60, tmp_path / "a.npz", **options)
    assert report.errors == ()
    assert 0.9 < report.bond_ratio_min < report.bond_ratio_max < 1.15
    with pytest.raises(Stop):
        simulate("O", 60, tmp_path / "b.npz", progress=stop_at(100), **options)
    assert simulate("O", 60, tmp_path / "b.npz", **options).resumed_from_step == 80
    whole, parts = (load_trajectory(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert whole.num_frames == 60
    assert whole.dt_fs == 0.5
    np.testing.assert_array_equal(whole.numbers, [8, 1, 1])
    np.testing.assert_allclose(whole.positions, parts.positions, atol=1e-5)
    assert whole.metadata["smiles"] == "O"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    assert capfd.readouterr() == ("", "")
