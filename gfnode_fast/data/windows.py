"""Windows of a trajectory: a start frame and T target frames, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.data.trajectory import Array, Trajectory

Sampling = Literal["irregular", "regular"]
Split = Literal["blocks", "published"]

SPLIT_NAMES = ("train", "val", "test")
# Frames that the published preparation leaves out at each end of a trajectory.
PUBLISHED_MARGIN = 10_000


@dataclass(frozen=True, eq=False)
class Windows:
    """S samples of one trajectory.

    Attributes
    ----------
    start : (S,) int64, row of each start frame.
    target : (S, T) int64, rows of the target frames.
    times : (S, T) int64, frames from the start to each target, > 0, strictly ascending.

    Raises
    ------
    TypeError, ValueError
        For other dtypes, shapes, or times that are not positive and ascending.
    """

    start: Tensor
    target: Tensor
    times: Tensor

    def __post_init__(self) -> None:
        for name in ("start", "target", "times"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != torch.int64:
                raise TypeError(
                    f"Windows: `{name}` must be an int64 tensor, got "
                    f"{getattr(value, 'dtype', type(value).__name__)}"
                )
        size = self.start.shape[0] if self.start.ndim == 1 else -1
        for name in ("target", "times"):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 2 or shape[0] != size or shape != tuple(self.target.shape):
                raise ValueError(
                    f"Windows: `{name}` must have shape (S, T) with `start` (S,), got {shape} "
                    f"and {tuple(self.start.shape)}"
                )
        ascending = torch.diff(self.times, dim=1, prepend=torch.zeros(size, 1, dtype=torch.int64))
        if not bool((ascending > 0).all()):
            raise ValueError("Windows: `times` must be positive and strictly ascending in each row")

    def __len__(self) -> int:
        return int(self.start.shape[0])

    @property
    def num_timesteps(self) -> int:
        """Number of target times T."""
        return int(self.target.shape[1])


def draw_windows(
    trajectory: Trajectory,
    *,
    num_timesteps: int,
    delta_frame: int,
    sampling: Sampling = "irregular",
    split: Split = "blocks",
    sizes: Sequence[int | None] = (500, 2000, 2000),
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int,
) -> dict[str, Windows]:
    """Draw training, validation and test windows.

    Parameters
    ----------
    trajectory : where from.
    num_timesteps : T, the number of target times of each window.
    delta_frame : length of a window in frames; targets lie 1 … delta_frame after the start.
    sampling : ``"irregular"``: T distinct times drawn uniformly without replacement from
        1 … delta_frame (on a trajectory with missing frames: from those that exist), sorted, drawn
        once per sample. ``"regular"``: ``k * delta_frame // T`` for k = 1 … T.
    split : ``"blocks"``: training, validation and test windows come from three contiguous blocks
        of time, `fractions` of the frames, with one window (delta_frame + 1 frames) left out
        between blocks, so that no frame of one split is within a window's length of another.
        ``"published"``: random starts anywhere in the interior, 10 000 frames off each end; on
        trajectories shorter than 100 000 frames a tenth of their length off each end. Test windows
        then overlap training windows in time: errors are optimistic.
    sizes : number of windows of train, val, test; starts are distinct. None: every start there is.
    fractions : lengths of the three blocks, in proportion; unused by ``"published"``.
    seed : 0 … 2**63 - 1. No global random state is read or changed.

    Returns
    -------
    dict with the `Windows` of "train", "val" and "test".

    Raises
    ------
    TypeError, ValueError
        For wrong options, and when the trajectory is too short or has too few usable starts; the
        text says how many there are and what to change.

    Notes
    -----
    Deterministic: the same arguments give the same windows on every platform and NumPy version
    (the bits of PCG64 are used directly). Usable starts are those of `Trajectory.starts` with the
    whole window inside their block and enough existing target frames. Cost is linear in frames
    and windows. Source of the sampling: GF-NODE (arXiv 2411.01600), data preparation.
    """
    _check_options(num_timesteps, delta_frame, sampling, split, sizes, fractions, seed)
    frames = trajectory.frames
    rng = _Uniform(seed)
    starts = trajectory.starts()
    spans = _spans(trajectory, delta_frame, split, fractions)
    windows = {}
    taken = np.empty(0, dtype=np.int64)
    for name, size, (first, last) in zip(SPLIT_NAMES, sizes, spans, strict=True):
        inside = (frames[starts] >= first) & (frames[starts] + delta_frame <= last)
        candidates = starts[inside]
        enough, available = _complete(frames, candidates, num_timesteps, delta_frame, sampling)
        if split == "published":
            enough &= ~np.isin(candidates, taken)
        candidates, available = candidates[enough], available[enough]
        chosen = _choose(rng, candidates, size, name, delta_frame, num_timesteps)
        taken = np.concatenate([taken, candidates[chosen]])
        windows[name] = _targets(
            rng, frames, candidates[chosen], available[chosen], num_timesteps, delta_frame, sampling
        )
    return windows


class _Uniform:
    """Uniform numbers in [0, 1) from PCG64's bits, whose stream NumPy guarantees for ever."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def __call__(self, *shape: int) -> Array:
        raw = self._bits.random_raw(int(np.prod(shape)))
        return (np.asarray(raw, dtype=np.uint64) >> np.uint64(11)).reshape(shape) * 2.0**-53


def _check_options(
    num_timesteps: int,
    delta_frame: int,
    sampling: str,
    split: str,
    sizes: Sequence[int | None],
    fractions: Sequence[float],
    seed: int,
) -> None:
    for name, value, least in (
        ("num_timesteps", num_timesteps, 1),
        ("delta_frame", delta_frame, 1),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"draw_windows: `{name}` must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"draw_windows: `{name}` must be at least {least}, got {value}")
    if num_timesteps > delta_frame:
        raise ValueError(
            f"draw_windows: `num_timesteps` must be at most delta_frame = {delta_frame}, the "
            f"number of distinct times, got {num_timesteps}"
        )
    for name, option, allowed in (
        ("sampling", sampling, get_args(Sampling)),
        ("split", split, get_args(Split)),
    ):
        if option not in allowed:
            raise ValueError(
                f"draw_windows: `{name}` must be one of {', '.join(allowed)}, got {option!r}"
            )
    if (
        not isinstance(sizes, Sequence)
        or len(sizes) != 3
        or any(
            size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1)
            for size in sizes
        )
    ):
        raise ValueError(
            "draw_windows: `sizes` must be three positive ints (train, val, test) or None for "
            f"every start, got {sizes!r}"
        )
    if len(fractions) != 3 or not all(
        isinstance(fraction, int | float) and 0 < fraction < float("inf") for fraction in fractions
    ):
        raise ValueError(
            f"draw_windows: `fractions` must be three positive numbers, got {fractions!r}"
        )


def _spans(
    trajectory: Trajectory, delta_frame: int, split: str, fractions: Sequence[float]
) -> list[tuple[int, int]]:
    """First and last frame number that windows of train, val and test may touch."""
    begin, end = int(trajectory.frames[0]), int(trajectory.frames[-1])
    length = end - begin + 1
    if split == "published":
        margin = min(PUBLISHED_MARGIN, length // 10)
        # The last *start* is `margin` off the end; its targets may lie in the margin.
        last = end if margin <= delta_frame else end - margin + delta_frame
        return [(begin + margin, last)] * 3
    gap = delta_frame + 1
    usable = length - 2 * gap
    edges = np.cumsum([0.0, *fractions]) / sum(fractions)
    bounds = [int(edge * usable) for edge in edges]
    if usable <= 0 or min(np.diff(bounds)) < gap:
        share = min(fractions) / sum(fractions)
        raise ValueError(
            f"draw_windows: `trajectory` must span at least {int(gap * (2 + 1 / share)) + 2} "
            f"frames for three blocks of windows of delta_frame = {delta_frame}, got {length}; "
            "lower delta_frame (data.delta_frame of a run), balance `fractions`, or pass "
            "split='published'"
        )
    return [
        (begin + bounds[block] + block * gap, begin + bounds[block + 1] + block * gap - 1)
        for block in range(3)
    ]


def _complete(
    frames: Array, candidates: Array, num_timesteps: int, delta_frame: int, sampling: str
) -> tuple[Array, Array]:
    """Which candidates have their targets, (C,) bool, and how many rows follow in the window."""
    beyond = np.searchsorted(frames, frames[candidates] + delta_frame, side="right")
    available = beyond - candidates - 1
    if sampling == "irregular":
        return available >= num_timesteps, available
    wanted = frames[candidates][:, None] + _regular_times(num_timesteps, delta_frame)
    rows = np.minimum(np.searchsorted(frames, wanted), len(frames) - 1)
    return (frames[rows] == wanted).all(axis=1), available


def _regular_times(num_timesteps: int, delta_frame: int) -> Array:
    return np.arange(1, num_timesteps + 1, dtype=np.int64) * delta_frame // num_timesteps


def _choose(
    rng: _Uniform,
    candidates: Array,
    size: int | None,
    name: str,
    delta_frame: int,
    num_timesteps: int,
) -> Array:
    """Indices of `size` distinct candidates, in random order."""
    if len(candidates) == 0 or (size is not None and size > len(candidates)):
        raise ValueError(
            f"draw_windows: `sizes` must be at most the usable starts, but {name} has "
            f"{len(candidates)} of them for {size} windows (delta_frame = {delta_frame}, "
            f"num_timesteps = {num_timesteps}); lower that size (data.{name}_size of a run), pass "
            "None for every start, lower delta_frame, or use a longer trajectory"
        )
    return np.argsort(rng(len(candidates)), kind="stable")[:size]


def _targets(
    rng: _Uniform,
    frames: Array,
    start: Array,
    available: Array,
    num_timesteps: int,
    delta_frame: int,
    sampling: str,
) -> Windows:
    if sampling == "regular":
        wanted = frames[start][:, None] + _regular_times(num_timesteps, delta_frame)
        target = np.searchsorted(frames, wanted)
    else:
        target = start[:, None] + 1 + _subsets(rng, available, num_timesteps)
    times = frames[target] - frames[start][:, None]
    return Windows(
        start=torch.from_numpy(start),
        target=torch.from_numpy(target.astype(np.int64)),
        times=torch.from_numpy(times),
    )


def _subsets(rng: _Uniform, available: Array, size: int) -> Array:
    """Sorted uniform `size`-subsets of range(available[s]) for each s: (S, size) int64.

    Floyd's algorithm over all samples at once: for j = n - size … n - 1 take a random t <= j,
    or j itself when t is already taken (Bentley and Floyd, CACM 30, 754 (1987)).
    """
    chosen = np.full((len(available), size), -1, dtype=np.int64)
    for k in range(size):
        top = available - size + k
        pick = (rng(len(available)) * (top + 1)).astype(np.int64)
        seen = (chosen[:, :k] == pick[:, None]).any(axis=1)
        chosen[:, k] = np.where(seen, top, pick)
    return np.sort(chosen, axis=1)
