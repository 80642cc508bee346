"""What `gfnode-fast data ...` does; as in `commands`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gfnode_fast.cli import console
from gfnode_fast.cli.console import OK
from gfnode_fast.cli.spectrum_figure import draw_spectrum
from gfnode_fast.data import MissingTimeStepError, inspect_trajectory, simulate
from gfnode_fast.data.readers import Format
from gfnode_fast.data.sample import sample_file
from gfnode_fast.spectra import spectral_gap_report
from gfnode_fast.training.config import SAMPLE_PREFIX, DataConfig
from gfnode_fast.training.problem import molecule_graph, read_trajectory


def inspect_command(
    file: str,
    dt_fs: float | None = None,
    topology: str | None = None,
    format: Format | None = None,
    horizon: int = 3000,
    json: bool = False,
) -> int:
    """Print what a trajectory file holds, and whether its frames are consecutive.

    Args:
        file: the trajectory, or sample:aspirin or sample:ethanol.
        dt_fs: time between frames, fs, where the file does not say.
        topology: for DCD, XTC and H5 files.
        format: where the file does not tell.
        horizon: frames ahead for the error of "nothing moves".
    """
    is_sample = file.startswith(SAMPLE_PREFIX)
    place = sample_file(file.removeprefix(SAMPLE_PREFIX)) if is_sample else nullcontext(Path(file))
    with place as path:
        found = inspect_trajectory(
            path, dt_fs=dt_fs, topology=topology, format=format, horizon=horizon
        ).as_dict()
    if json:
        console.say_json(found)
    else:
        console.say_nested(found)
    return OK


def spectrum_command(
    file: str,
    dt_fs: float | None = None,
    topology: str | None = None,
    format: Format | None = None,
    heavy_only: bool = True,
    bonds: Literal["covalent", "published"] = "covalent",
    output: str = "spectrum.png",
    json: bool = False,
) -> int:
    """Print and draw the spectrum of a molecule's graph: which numbers of modes are safe.

    Args:
        file: a trajectory, or sample:aspirin or sample:ethanol; its first frame counts.
        dt_fs: time between frames, fs; not needed, but must agree with what the file says.
        topology: for DCD, XTC and H5 files.
        format: where the file does not tell.
        heavy_only: drop hydrogens.
        bonds: covalent radii, or the published 1.6 Å rule.
        output: the picture, a PNG.
    """
    data = DataConfig(
        file, dt_fs, topology=topology, format=format, heavy_only=heavy_only, bonds=bonds
    )
    try:
        trajectory = read_trajectory(data)
    except MissingTimeStepError:
        # A graph does not depend on it; 1 fs only stands in.
        trajectory = read_trajectory(replace(data, dt_fs=1.0))
    graph = molecule_graph(trajectory, data)
    draw_spectrum(graph, trajectory.positions[0], output)
    spaces = spectral_gap_report(graph.eigenvalues, 1).spaces
    if json:
        rows = [{"eigenvalue": v, "first_mode": k, "modes": count} for v, k, count in spaces]
        console.say_json({"atoms": graph.num_atoms, "edges": graph.num_edges, "eigenspaces": rows})
        return OK
    console.say(f"{graph.num_atoms} atoms, {graph.num_edges} directed edges")
    console.say_table(
        ("eigenvalue", "first mode", "modes", "safe M"),
        [(f"{abs(v):.6f}", str(k), str(count), str(k + count)) for v, k, count in spaces],
    )
    console.say(f"picture: {output}")
    return OK


def simulate_command(
    smiles: str,
    frames: int,
    output: str = "simulated.npz",
    temperature_K: float = 500.0,
    step_fs: float = 0.5,
    stride: int = 1,
    equilibration: int = 10_000,
    tau_fs: float = 100.0,
    seed: int = 0,
    checkpoint_every: int = 1000,
) -> int:
    """Make a trajectory of a small molecule with GFN2-xTB; the same command goes on after a stop.

    Args:
        smiles: the molecule.
        frames: frames to record.
        output: the npz to write.
        temperature_K: of the thermostat.
        step_fs: time step.
        stride: steps between recorded frames.
        equilibration: steps before the first recorded frame.
        tau_fs: time constant of the thermostat.
        seed: of structure, velocities and thermostat.
        checkpoint_every: steps between checkpoints.
    """
    with console.step_progress("step") as show:
        report = simulate(
            smiles,
            frames,
            output,
            temperature_K=temperature_K,
            step_fs=step_fs,
            stride=stride,
            equilibration=equilibration,
            tau_fs=tau_fs,
            seed=seed,
            checkpoint_every=checkpoint_every,
            progress=lambda done, total: show(done, total, ""),
        )
    for warning in report.warnings:
        console.complain(f"simulate: warning: {warning}")
    console.say(
        f"{report.path}: {report.frames} frames at {report.mean_temperature_K:.0f} K "
        f"(wanted {report.target_temperature_K:.0f} ± {report.temperature_tolerance_K:.0f} K)"
    )
    return OK
