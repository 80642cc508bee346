"""Trajectories, molecular graphs, windows of time, and batches of them."""

from gfnode_fast.data.compact import write_compact
from gfnode_fast.data.dataset import Batch, WindowDataset
from gfnode_fast.data.files import WriteError
from gfnode_fast.data.graph import PUBLISHED_RIGID_BONDS, MolecularGraph, build_graph
from gfnode_fast.data.inspection import Inspection, inspect_trajectory
from gfnode_fast.data.mixed import MixedBatch, MixedDataset
from gfnode_fast.data.readers import load_trajectory
from gfnode_fast.data.sample import load_sample
from gfnode_fast.data.simulation import SimulationError, SimulationReport, simulate
from gfnode_fast.data.splits import load_windows, save_windows
from gfnode_fast.data.trajectory import MissingTimeStepError, Trajectory, TrajectoryError
from gfnode_fast.data.windows import Windows, draw_windows

__all__ = [
    "PUBLISHED_RIGID_BONDS",
    "Batch",
    "Inspection",
    "MissingTimeStepError",
    "MixedBatch",
    "MixedDataset",
    "MolecularGraph",
    "SimulationError",
    "SimulationReport",
    "Trajectory",
    "TrajectoryError",
    "WindowDataset",
    "Windows",
    "WriteError",
    "build_graph",
    "draw_windows",
    "inspect_trajectory",
    "load_sample",
    "load_trajectory",
    "load_windows",
    "save_windows",
    "simulate",
    "write_compact",
]
