"""Training time and memory against the size of the molecule: linear in its edges?

    python benchmarks/large_systems.py [--device cuda] [--json OUT] [--batch 16] [--steps 6]

Aspirin's heavy atoms (13) and Ac-Ala3-NHMe (42) from GFN2-xTB runs, and capped peptides of 148 and
370 atoms on ideal geometry with synthetic vibrations (peptides.py), each trained by
`gfnode_fast.train` with the published sizes, and with recompute=False, so that all do the same work
per edge. Per system: seconds a step between readings of the losses, peak memory of a step, and what
is paid once per molecule: building the graph with its eigenvectors. Over all systems: the line
through time and memory against directed edges, and time per edge, largest over smallest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported

import numpy as np
import torch

from benchmarks import environment, training_runs
from benchmarks.formatting import heading
from benchmarks.peptides import SYSTEMS, capped_peptide, vibrating
from benchmarks.timing import Timing, peak_memory
from benchmarks.training_tables import large_systems_table
from gfnode_fast.data import Trajectory, build_graph, load_sample, load_trajectory
from gfnode_fast.training import DataConfig, ModelConfig, OptimConfig, TrainConfig

ASPIRIN, AC_ALA3_NHME = 13, 42
SIZES = (ASPIRIN, AC_ALA3_NHME, *SYSTEMS)
# gfnode-fast data simulate --smiles 'CC(=O)N[C@@H](C)C(=O)N[C@@H](C)C(=O)N[C@@H](C)C(=O)NC'
#     --frames 2400 --equilibration 2000, the first 1000 frames coded by write_compact
AC_ALA3_NHME_FILE = environment.ROOT / "benchmarks" / "data" / "xtb_ac_ala3_nhme.npz"
NUM_FRAMES = 1000
HORIZON = 100  # frames; the published 3000 would need trajectories of a hundred megabytes


@dataclass(frozen=True)
class Size:
    """Batch, steps that are timed one by one after `warm` others, and sizes of the model."""

    batch: int = 16
    steps: int = 6
    warm: int = 2
    model: tuple[tuple[str, int], ...] = ()


def trajectory_of(num_atoms: int) -> tuple[Trajectory, str]:
    """A trajectory of a system with this many atoms, and what it is."""
    if num_atoms == ASPIRIN:
        sample = load_sample("aspirin")
        part = Trajectory(sample.positions[:NUM_FRAMES], sample.numbers, dt_fs=sample.dt_fs)
        return part, "aspirin, heavy atoms (GFN2-xTB)"
    if num_atoms == AC_ALA3_NHME:
        return load_trajectory(AC_ALA3_NHME_FILE), "Ac-Ala3-NHMe (GFN2-xTB)"
    residues = SYSTEMS[num_atoms]
    part = vibrating(*capped_peptide(residues), NUM_FRAMES)
    return part, f"Ac-(Ala,Gly){len(residues)}-NHMe (synthetic)"


def config(
    trajectory: Path, output: Path, size: Size, device: torch.device, backend: str
) -> TrainConfig:
    steps = 1 + size.warm + size.steps
    return TrainConfig(
        data=DataConfig(
            trajectory=str(trajectory), heavy_only=False, delta_frame=HORIZON,
            train_size=4 * size.batch, val_size=1, test_size=1,
        ),
        model=ModelConfig(backend=backend, recompute=False, **dict(size.model)),
        optim=OptimConfig(batch_size=size.batch, epochs=steps, validate_every=steps),
        output=str(output),
        device=device.type,
        log_every=1,
        checkpoint_every=steps,
        max_steps=steps,
    )  # fmt: skip


def measure_system(
    num_atoms: int, size: Size, device: torch.device, folder: Path, backend: str
) -> dict[str, Any]:
    """Train on one system and weigh a step."""
    training_runs.progress(f"N = {num_atoms}")
    trajectory, what = trajectory_of(num_atoms)
    begin = time.perf_counter()
    graph = build_graph(trajectory.positions[0], trajectory.numbers)
    graph_s = time.perf_counter() - begin
    folder.mkdir(parents=True, exist_ok=True)
    file, run = folder / f"{num_atoms}.npz", folder / f"{num_atoms}"
    trajectory.save(file)
    watch, _ = training_runs.watched(config(file, run, size, device, backend), "max_steps")
    step = training_runs.bare_step(run, trajectory, device)
    step()
    return {
        "num_atoms": num_atoms,
        "system": what,
        "edges": graph.num_edges,
        "graph_s": graph_s,
        "first_loss": watch.losses[0],
        "last_loss": watch.losses[-1],
        **Timing(watch.step_seconds(1 + size.warm)).summary(),
        "peak_bytes": peak_memory(step, device),
    }


def linearity(systems: list[dict[str, Any]], key: str) -> dict[str, float]:
    """The line through `key` against edges, and how evenly edges cost.

    `intercept` and `slope` by least squares; `per_edge_ratio`: largest over smallest of `key` over
    edges; `last_exponent`: d log key / d log edges between the two largest systems, 1 where linear.
    Empty for a single system.
    """
    edges = np.array([system["edges"] for system in systems], dtype=float)
    values = np.array([system[key] for system in systems], dtype=float)
    if len(systems) < 2:
        return {}
    slope, intercept = np.polyfit(edges, values, 1)
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "per_edge_ratio": float((values / edges).max() / (values / edges).min()),
        "last_exponent": float(np.log(values[-1] / values[-2]) / np.log(edges[-1] / edges[-2])),
    }


def measure(
    sizes: tuple[int, ...],
    size: Size,
    device: torch.device,
    folder: Path,
    *,
    backend: str = "auto",
) -> dict[str, Any]:
    """Every system in turn, smallest first, and how they compare."""
    systems = [measure_system(num_atoms, size, device, folder, backend) for num_atoms in sizes]
    return {
        "backend": backend,
        "batch": size.batch,
        "systems": systems,
        "time": linearity(systems, "median_s"),
        "memory": linearity(systems, "peak_bytes"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = training_runs.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--backend", default="auto", help="model.backend")
    options = parser.parse_args(arguments)
    device = training_runs.chosen_device(options)
    size = Size(options.batch, options.steps)

    def run(folder: Path) -> dict[str, Any]:
        return measure(SIZES, size, device, folder, backend=options.backend)

    result = training_runs.measured("large_systems.py", arguments, device, run)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(heading(result["about"]), large_systems_table(result), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
