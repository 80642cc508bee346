"""What a trajectory file holds, for a person deciding whether to train on it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from gfnode_fast.data.dataset import FAR_FROM_ORIGIN
from gfnode_fast.data.elements import MAX_ATOMIC_NUMBER, SYMBOLS, covalent_radii
from gfnode_fast.data.npz import read_headers
from gfnode_fast.data.readers import Format, detect_format, load_trajectory
from gfnode_fast.data.trajectory import Array, MissingTimeStepError, Trajectory

# Bond length over the sum of covalent radii, if the positions were Å, nm or bohr.
_UNIT_RATIOS = {"Å": 1.0, "nm": 0.1, "bohr": 1.0 / 0.529177}
_SAMPLES = 1000


@dataclass(frozen=True)
class Inspection:
    """Description of a trajectory file.

    keys : arrays of an npz file with dtype and shape; empty for other formats.
    dt_fs, duration_ps : None when the file does not say its time step.
    consecutive : whether no frame is missing between first and last; missing_frames : how many.
    shuffled : whether the rows of the file were out of order (they are sorted on reading).
    unit_guess : "Å", "nm" or "bohr", from the shortest distances, or "unknown".
    extent : largest coordinate's distance from the origin, Å.
    step : root mean square displacement of a coordinate between successive frames, Å, or None.
    horizon : frames; nothing_moves : mean squared displacement of a coordinate (hydrogens left
        out) over `horizon` frames, Å²: the error of predicting that nothing moves.
    start_rows : rows usable as the start of a window.
    warnings : what will go wrong, in words.
    """

    path: str
    format: str
    keys: dict[str, str]
    formula: str
    num_atoms: int
    num_frames: int
    first_frame: int
    last_frame: int
    consecutive: bool
    missing_frames: int
    shuffled: bool
    start_rows: int
    dt_fs: float | None
    duration_ps: float | None
    unit_guess: str
    extent: float
    step: float | None
    horizon: int
    nothing_moves: float | None
    content_hash: str
    metadata: dict[str, object]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return all fields in a JSON-serialisable dict."""
        return {**asdict(self), "warnings": list(self.warnings)}


def inspect_trajectory(
    path: str | os.PathLike[str],
    *,
    dt_fs: float | None = None,
    topology: str | os.PathLike[str] | None = None,
    format: Format | None = None,
    horizon: int = 3000,
) -> Inspection:
    """Describe a trajectory file; arguments as for `load_trajectory`, but dt may be unknown.

    Parameters
    ----------
    horizon : frames ahead for `Inspection.nothing_moves`; shortened to what the file has.

    Raises
    ------
    As `load_trajectory`, apart from a missing dt.
    """
    known_dt = True
    try:
        trajectory = load_trajectory(path, dt_fs=dt_fs, topology=topology, format=format)
    except MissingTimeStepError:
        known_dt = False
        # Times in frames do not depend on dt; 1 fs only stands in until it is reported as unknown.
        trajectory = load_trajectory(path, dt_fs=1.0, topology=topology, format=format)
    frames = trajectory.frames
    span = int(frames[-1] - frames[0])
    horizon = max(1, min(horizon, span // 2))
    dt = trajectory.dt_fs if known_dt else None
    found = Inspection(
        path=str(path),
        format=format or detect_format(path),
        keys=_keys(path),
        formula=_formula(trajectory.numbers),
        num_atoms=trajectory.num_atoms,
        num_frames=trajectory.num_frames,
        first_frame=int(frames[0]),
        last_frame=int(frames[-1]),
        consecutive=trajectory.consecutive,
        missing_frames=span + 1 - trajectory.num_frames,
        shuffled=bool(trajectory.metadata.get("shuffled_in_file", False)),
        start_rows=len(trajectory.starts()),
        dt_fs=dt,
        duration_ps=None if dt is None else span * dt / 1000.0,
        unit_guess=_guess_unit(trajectory),
        extent=float(np.abs(trajectory.positions).max()),
        step=_step(trajectory),
        horizon=horizon,
        nothing_moves=_nothing_moves(trajectory, horizon),
        content_hash=trajectory.content_hash(),
        metadata=trajectory.metadata,
        warnings=(),
    )
    return replace(found, warnings=tuple(_warnings(found)))


def _keys(path: str | os.PathLike[str]) -> dict[str, str]:
    if Path(path).suffix.lower() != ".npz":
        return {}
    return {key: f"{dtype} {shape}" for key, (shape, dtype) in read_headers(path).items()}


def _formula(numbers: Array) -> str:
    """Molecular formula in Hill order: carbon, hydrogen, then by symbol."""
    counts = Counter(SYMBOLS[number - 1] for number in numbers.tolist())
    order = sorted(counts, key=lambda symbol: ({"C": 0, "H": 1}.get(symbol, 2), symbol))
    return "".join(f"{symbol}{counts[symbol] if counts[symbol] > 1 else ''}" for symbol in order)


def _guess_unit(trajectory: Trajectory) -> str:
    numbers = trajectory.numbers
    if trajectory.num_atoms < 2 or numbers.max() > MAX_ATOMIC_NUMBER:
        return "unknown"
    frame = trajectory.positions[0].astype(np.float64)
    distance = np.sqrt(np.square(frame[:, None] - frame[None]).sum(axis=-1))
    radii = covalent_radii(numbers)
    ratio = distance / (radii[:, None] + radii[None])
    np.fill_diagonal(ratio, np.inf)
    bond = float(np.median(ratio.min(axis=1)))
    if bond <= 0:
        return "unknown"
    unit = min(_UNIT_RATIOS, key=lambda name: abs(np.log(bond / _UNIT_RATIOS[name])))
    return unit if 0.75 < bond / _UNIT_RATIOS[unit] < 1.35 else "unknown"


def _evenly(rows: Array) -> Array:
    """At most `_SAMPLES` of the rows, evenly spread."""
    if len(rows) <= _SAMPLES:
        return rows
    return rows[np.linspace(0, len(rows) - 1, _SAMPLES).astype(np.int64)]


def _step(trajectory: Trajectory) -> float | None:
    starts = _evenly(trajectory.starts())
    if not len(starts):
        return None
    return float(np.sqrt(np.square(trajectory.velocities(starts)).mean()))


def _nothing_moves(trajectory: Trajectory, horizon: int) -> float | None:
    """Mean over starts, and the last row within `horizon` of each, of the squared displacement."""
    frames = trajectory.frames
    rows = _evenly(np.flatnonzero(frames + horizon <= frames[-1]))
    ahead = np.searchsorted(frames, frames[rows] + horizon, side="right") - 1
    rows, ahead = rows[ahead > rows], ahead[ahead > rows]
    if not len(rows):
        return None
    heavy = trajectory.numbers > 1
    atoms = heavy if heavy.any() else ~heavy
    positions = trajectory.positions[:, atoms]
    moved = positions[ahead].astype(np.float64) - positions[rows]
    return float(np.square(moved).mean())


def _warnings(found: Inspection) -> list[str]:
    warnings = []
    if found.dt_fs is None:
        warnings.append("the file does not say the time between frames: pass dt_fs")
    if found.unit_guess not in ("Å", "unknown"):
        warnings.append(f"distances look like {found.unit_guess}, not Å: convert the positions")
    if found.shuffled:
        warnings.append("the rows were shuffled: they are sorted by frame number on reading")
    if found.missing_frames:
        warnings.append(
            f"{found.missing_frames} frames are missing between the first and the last: "
            "targets are drawn among the frames that exist"
        )
    if not found.start_rows:
        warnings.append("no frame has a velocity (none is followed by the next): no windows")
    if found.extent > FAR_FROM_ORIGIN:
        warnings.append(
            f"positions reach {found.extent:.0f} Å from the origin: each sample is centred"
        )
    return warnings
