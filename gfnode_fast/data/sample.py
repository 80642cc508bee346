"""The trajectories shipped with the package."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, get_args

from gfnode_fast.data.readers import load_trajectory
from gfnode_fast.data.trajectory import Trajectory

SampleName = Literal["aspirin", "ethanol"]


def load_sample(name: SampleName) -> Trajectory:
    """Load a shipped GFN2-xTB trajectory: heavy atoms, 500 K, a frame every 0.5 fs.

    ``"aspirin"``: 13 atoms, 60 000 frames; ``"ethanol"``: 3 atoms, 100 000 frames; positions
    rounded to 1e-5 Å. They are not MD17: an error measured on them is no MD17 result. Provenance
    and licence stand in ``samples/README.md`` beside the files and in the metadata.

    Raises
    ------
    ValueError
        For another name.
    TrajectoryError
        When the installed file is damaged (its content hash is compared).
    """
    with sample_file(name) as path:
        return load_trajectory(path, format="compact")


def sample_file(name: str) -> AbstractContextManager[Path]:
    """The file of `load_sample`'s trajectory, for as long as the context lasts.

    Raises
    ------
    ValueError
        For another name.
    """
    if name not in get_args(SampleName):
        raise ValueError(
            f"load_sample: `name` must be one of {', '.join(get_args(SampleName))}, got {name!r}; "
            "name one of them"
        )
    return as_file(files("gfnode_fast.data").joinpath("samples", f"xtb_{name}_heavy.npz"))
