"""From a configuration to what is trained: trajectory, graph, windows, and an untrained model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.data import (
    PUBLISHED_RIGID_BONDS,
    MolecularGraph,
    Trajectory,
    WindowDataset,
    Windows,
    build_graph,
    draw_windows,
    load_sample,
    load_trajectory,
    load_windows,
)
from gfnode_fast.nn import GFNODE, FourierMD
from gfnode_fast.spectra import spectral_gap_report
from gfnode_fast.training.config import SAMPLE_PREFIX, ConfigError, DataConfig, TrainConfig

logger = logging.getLogger(__name__)

NODE_FEATURES = 2
EDGE_FEATURES = 5


class GraphMismatchError(ValueError):
    """The molecule at hand is not the one that the model was trained on."""


@dataclass(frozen=True)
class Problem:
    """Everything that follows from a :class:`DataConfig`.

    Attributes:
        trajectory: the frames, with or without hydrogens as configured.
        graph: of the molecule; on resume and evaluation the one stored with the checkpoint.
        windows: ``train``, ``val`` and ``test``.
        hashes: of the contents of ``trajectory`` and ``windows``.
    """

    trajectory: Trajectory
    graph: MolecularGraph
    windows: dict[str, Windows]
    hashes: dict[str, str]

    def dataset(
        self,
        split: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        largest_number: int | None = None,
    ) -> WindowDataset:
        """The windows of one part as tensors on a device; arguments as of `WindowDataset`."""
        return WindowDataset(
            self.trajectory,
            self.graph,
            self.windows[split],
            dtype=dtype,
            device=device,
            largest_number=largest_number,
        )


def read_trajectory(data: DataConfig) -> Trajectory:
    """The trajectory that the configuration names.

    Raises:
        ConfigError: it names several.
    """
    if data.is_mixed:
        raise ConfigError(
            f"config: `data.molecules` must be left out here, where one trajectory is meant, got "
            f"{', '.join(data.by_molecule())}; name one as data.trajectory"
        )
    if data.trajectory.startswith(SAMPLE_PREFIX):
        name = data.trajectory.removeprefix(SAMPLE_PREFIX)
        return load_sample(name)  # type: ignore[arg-type] # it checks the name itself
    return load_trajectory(
        data.trajectory,
        dt_fs=data.dt_fs,
        topology=data.topology,
        format=data.format,
        heavy_only=data.heavy_only,
    )


def molecule_graph(trajectory: Trajectory, data: DataConfig) -> MolecularGraph:
    """The graph of a trajectory's first frame, with the configured bonds."""
    rigid = data.rigid_bonds
    if isinstance(rigid, str):
        if rigid not in PUBLISHED_RIGID_BONDS:
            raise ConfigError(
                f"config: `data.rigid_bonds` must be pairs or one of "
                f"{', '.join(PUBLISHED_RIGID_BONDS)}, got {rigid!r}; choose one of them"
            )
        rigid = list(PUBLISHED_RIGID_BONDS[rigid])
    return build_graph(
        trajectory.positions[0], trajectory.numbers, bonds=data.bonds, rigid_bonds=tuple(rigid)
    )


def load_problem(
    data: DataConfig,
    *,
    stored_graph: MolecularGraph | None = None,
    trajectory: Trajectory | None = None,
) -> Problem:
    """Read, draw and hash.

    Args:
        data: what to read and draw.
        stored_graph: the graph of a checkpoint. It is used in place of the new one (eigenvectors
            are determined up to sign, and up to rotation where eigenvalues coincide, so another
            machine may find others), after :func:`check_graph`.
        trajectory: in place of the one that ``data`` names.

    Deterministic for a given file and configuration; global random state is not touched.
    """
    trajectory = read_trajectory(data) if trajectory is None else trajectory
    graph = molecule_graph(trajectory, data)
    if stored_graph is not None:
        check_graph(stored_graph, graph)
        graph = stored_graph
    windows = _windows(trajectory, data)
    hashes = {"trajectory": trajectory.content_hash(), "windows": _hash_windows(windows)}
    return Problem(trajectory, graph, windows, hashes)


def _windows(trajectory: Trajectory, data: DataConfig) -> dict[str, Windows]:
    if data.split_file is None:
        return draw_windows(
            trajectory,
            num_timesteps=data.num_timesteps,
            delta_frame=data.delta_frame,
            sampling=data.sampling,
            split=data.split,
            sizes=(data.train_size, data.val_size, data.test_size),
            fractions=data.fractions,
            seed=data.seed,
        )
    windows = load_windows(data.split_file, trajectory)
    for name, part in windows.items():
        if part.num_timesteps != data.num_timesteps or int(part.times.max()) > data.delta_frame:
            raise ConfigError(
                f"config: `data.split_file` must have windows of {data.num_timesteps} times up to "
                f"{data.delta_frame} frames, got {part.num_timesteps} up to "
                f"{int(part.times.max())} in the {name} part of {data.split_file}; set "
                "data.num_timesteps and data.delta_frame to its values"
            )
    return windows


def build_model(config: TrainConfig, num_atoms: int, *, backend: str | None = None) -> FourierMD:
    """An untrained model, on the CPU, in float32: a GFNODE where several molecules are configured.

    Draws its initial values from torch's global random state.

    Args:
        config: of the run.
        num_atoms: N; of the smallest of several molecules.
        backend: in place of ``config.model.backend``; another one than ``triton`` computes in fp32.
    """
    model = config.model
    if backend is not None:
        precision = model.precision if backend == "triton" else "fp32"
        model = replace(model, backend=backend, precision=precision)
    kind = GFNODE if config.data.is_mixed else FourierMD
    return kind(
        in_node_nf=NODE_FEATURES,
        in_edge_nf=EDGE_FEATURES,
        with_v=True,
        num_timesteps=config.data.num_timesteps,
        delta_frame=config.data.delta_frame,
        num_atoms=None if config.data.is_mixed else num_atoms,
        **asdict(model),
    )


def warn_if_modes_cut(config: TrainConfig, graph: MolecularGraph, prefix: str = "") -> None:
    """Log a warning, ``prefix`` before it, where the M modes end inside an eigenspace."""
    model = config.model
    if model.fourier_basis != "graph" or model.no_fourier:
        return
    report = spectral_gap_report(graph.eigenvalues, model.num_modes)
    if report.cuts:
        logger.warning("train: %s%s", prefix, report)


def resolve_device(name: str) -> torch.device:
    """The device that a configuration means.

    Raises:
        ValueError: another name. RuntimeError: a GPU was asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(
            f"train: `device` must be auto, cpu, cuda or cuda:N, got {name!r}; choose one of them"
        )
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RuntimeError(
            f"train: `device` must be available, got {name!r} where torch finds {count or 'no'} "
            f"GPU{'s' if count > 1 else ''}; use cpu or auto"
        )
    return device


def torch_dtype(config: TrainConfig) -> torch.dtype:
    """The precision that a configuration means."""
    return {"float32": torch.float32, "float64": torch.float64}[config.optim.dtype]


@contextlib.contextmanager
def forked_random_state(device: torch.device) -> Iterator[None]:
    """Restore torch's global random state, on the CPU and on ``device``, at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def graph_to_tensors(graph: MolecularGraph) -> dict[str, Tensor]:
    """The graph's fields, for a checkpoint."""
    return {field.name: getattr(graph, field.name) for field in fields(graph)}


def graph_from_tensors(tensors: Mapping[str, Tensor]) -> MolecularGraph:
    """Inverse of :func:`graph_to_tensors`."""
    return MolecularGraph(**tensors)


def check_graph(stored: MolecularGraph, found: MolecularGraph) -> None:
    """Check that a checkpoint's graph and eigenvector basis belong to the molecule at hand.

    Raises:
        GraphMismatchError: other atoms, other edges, or eigenvectors that do not diagonalise the
            Laplacian of the molecule at hand.
    """
    if not torch.equal(stored.numbers, found.numbers):
        raise GraphMismatchError(
            f"graph: `numbers` must be the checkpoint's atoms {stored.numbers.tolist()}, "
            f"got {found.numbers.tolist()}; use the molecule, and the atom order, of the training"
        )
    stored_edges, found_edges = _edges(stored), _edges(found)
    if stored_edges != found_edges:
        changed = sorted(stored_edges ^ found_edges)
        raise GraphMismatchError(
            f"graph: `edges` must be the checkpoint's {len(stored_edges)} (row, col, hops, stick), "
            f"got {len(found_edges)}, of which {len(changed)} in one of the two only, such as "
            f"{changed[0]}; use the molecule and the bond options of the training"
        )
    laplacian, basis = found.laplacian.double(), stored.eigvecs.double()
    error = (laplacian @ basis - basis * stored.eigenvalues.double()).abs().max()
    error = torch.maximum(error, (basis.T @ basis - torch.eye(len(basis))).abs().max())
    if not error <= 1e-8 * max(1.0, float(laplacian.abs().max())):
        raise GraphMismatchError(
            f"graph: `eigvecs` must be an orthonormal eigenbasis of the molecule's Laplacian, "
            f"got the checkpoint's with a residual of {float(error):.2g}; "
            "the checkpoint was changed, use another"
        )


def check_time_step(op: str, trained_dt_fs: float, trajectory: Trajectory) -> None:
    """Check that a trajectory has the frames of the training, in which times and velocities count.

    Raises:
        ValueError: it has another time step.
    """
    if not math.isclose(trained_dt_fs, trajectory.dt_fs, rel_tol=1e-3):
        raise ValueError(
            f"{op}: `trajectory` must have the training's {trained_dt_fs:g} fs between frames, "
            f"got {trajectory.dt_fs:g} fs; times and velocities are counted in frames: use "
            "frames of that spacing"
        )


def _edges(graph: MolecularGraph) -> set[tuple[int, ...]]:
    columns = (graph.row, graph.col, graph.hops, graph.stick)
    return set(zip(*(column.long().tolist() for column in columns), strict=True))


def _hash_windows(windows: Mapping[str, Windows]) -> str:
    digest = hashlib.sha256()
    for name in sorted(windows):
        digest.update(name.encode())
        for tensor in (windows[name].start, windows[name].target, windows[name].times):
            array = np.ascontiguousarray(tensor.cpu().numpy().astype("<i8"))
            digest.update(f"{array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
