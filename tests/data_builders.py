"""Small trajectories for tests, made from a seed."""

import numpy as np

from gfnode_fast.data import Trajectory

ETHANOL = np.array([6, 6, 8, 1, 1, 1, 1, 1, 1])
ETHANOL_POSITIONS = np.array(
    [
        [-1.1708, 0.1790, 0.0246],
        [0.0559, -0.7066, -0.0136],
        [1.2132, 0.1143, 0.0102],
        [-2.0716, -0.4388, -0.0011],
        [-1.1796, 0.8601, -0.8290],
        [-1.1818, 0.7740, 0.9404],
        [0.0527, -1.3080, -0.9249],
        [0.0453, -1.3780, 0.8467],
        [1.9835, -0.4560, -0.0158],
    ]
)


def make_trajectory(
    num_frames=200, numbers=ETHANOL, *, frames=None, dtype=np.float64, seed=0, offset=0.0, dt_fs=0.5
):
    """Atoms that swing smoothly about ethanol's structure (or about a chain)."""
    rng = np.random.default_rng(seed)
    numbers = np.asarray(numbers)
    if len(numbers) == len(ETHANOL):
        rest = ETHANOL_POSITIONS
    else:
        rest = np.arange(len(numbers))[:, None] * np.array([1.2, 0.3, 0.1])
    times = np.arange(num_frames) if frames is None else np.asarray(frames)
    rate = rng.uniform(0.005, 0.05, size=(len(numbers), 3))
    phase = rng.uniform(0, 2 * np.pi, size=(len(numbers), 3))
    positions = rest + 0.05 * np.sin(rate * times[:, None, None] + phase) + offset
    return Trajectory(
        positions=positions.astype(dtype),
        numbers=numbers,
        dt_fs=dt_fs,
        frames=times.astype(np.int64),
    )


def sparse_frames(span, count, seed=0):
    """`count` distinct ascending frame numbers below `span`, with some successive pairs."""
    rng = np.random.default_rng(seed)
    half = rng.choice(span - 1, size=count, replace=False)
    return np.unique(np.concatenate([half, half[: count // 2] + 1]))
