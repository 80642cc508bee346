"""Windows as tensors on one device, and batches of them as `FourierMD.forward` takes them."""

from __future__ import annotations

from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.data.graph import MolecularGraph
from gfnode_fast.data.trajectory import Trajectory
from gfnode_fast.data.windows import Windows

# Beyond this distance from the origin, in Å, float32 positions are too coarse (4e-6 Å at 50 Å, a
# thousandth of a velocity at 0.5 fs) and each sample is shifted to its own centroid.
FAR_FROM_ORIGIN = 50.0


class Batch(NamedTuple):
    """B samples: the arguments of `FourierMD.forward`, and the positions to predict.

    x, v, loc_mean : (B*N, 3) Å, Å/frame, Å. h : (B*N, 2). edge_index : pair of (B*E,) int64.
    edge_fea : (B*E, 5). timeframes : (B, T) frames. U_batch : (B, N, N), one basis broadcast
    (stride 0). target : (T*B*N, 3) Å, ordered [t, b, n].
    """

    x: Tensor
    h: Tensor
    edge_index: tuple[Tensor, Tensor]
    edge_fea: Tensor
    v: Tensor
    loc_mean: Tensor
    timeframes: Tensor
    U_batch: Tensor
    target: Tensor

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of `FourierMD.forward`: everything but the target."""
        values = self._asdict()
        del values["target"]
        return values

    def loss(self, predicted: Tensor) -> Tensor:
        """Mean squared error, Å², of predicted positions, shaped as `target`."""
        return (predicted - self.target).square().mean()

    def error_sums(self, predicted: Tensor) -> Tensor:
        """(1, 2) float64: the summed error of the B samples, at all times and at the last."""
        squared = (predicted - self.target).double().square()
        by_time = squared.view(self.timeframes.shape[1], -1).mean(dim=1)
        return len(self.timeframes) * torch.stack((by_time.mean(), by_time[-1]))[None]


class WindowDataset:
    """All samples of `windows` as tensors on one device; a batch is index operations there.

    Node features are ``[|v_i|, z_i / max z]``, edge features ``[z_i, z_j, hops, stick,
    |x_i - x_j|²]`` with the distance in the sample's own start frame.

    Parameters
    ----------
    trajectory, windows : the windows and the trajectory they were drawn from.
    graph : of the same molecule.
    dtype : float32 or float64, of every floating-point tensor of a batch.
    device : where everything lives.
    largest_number : in place of max z in the node features, so that an element has one feature in
        data sets of several molecules; at least max z.

    Attributes
    ----------
    origin : (S, 3) float64 on the device, Å: what was subtracted from the positions of each sample.
        Zero, so that positions are the file's own, unless the trajectory reaches farther than 50 Å
        from the origin: then each sample's centroid at its start frame, subtracted in float64.

    Raises
    ------
    TypeError, ValueError
        For a graph of another molecule, windows that point outside the trajectory or whose times
        are not its frame numbers, and other dtypes.

    Notes
    -----
    Memory: S * (T + 2) * N * 3 numbers. Deterministic. Source of the features: GF-NODE
    (arXiv 2411.01600), data preparation.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        graph: MolecularGraph,
        windows: Windows,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        largest_number: int | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"WindowDataset: `dtype` must be float32 or float64, got {dtype}")
        _check_match(trajectory, graph, windows)
        largest = int(graph.numbers.max())
        if largest_number is not None and largest_number < largest:
            raise ValueError(
                f"WindowDataset: `largest_number` must be at least the molecule's {largest}, got "
                f"{largest_number}; take the largest of all molecules"
            )
        start, target = windows.start.numpy(), windows.target.numpy()
        here = trajectory.positions[start].astype(np.float64)
        origin = np.zeros((len(start), 3))
        if np.abs(trajectory.positions).max() > FAR_FROM_ORIGIN:
            origin = here.mean(axis=1)
        # In the file's dtype until here: the shift must precede the rounding to `dtype`.
        ahead = trajectory.positions[target] - origin[:, None, None]
        here = here - origin[:, None]
        numbers = graph.numbers.to(dtype)
        edge_static = torch.stack(
            [numbers[graph.row], numbers[graph.col], graph.hops.to(dtype), graph.stick.to(dtype)], 1
        )
        self.graph = graph
        self.num_atoms = graph.num_atoms
        self.num_edges = graph.num_edges
        self.num_timesteps = windows.num_timesteps
        self.dtype = dtype
        # The values of a batch are gathered from these; _STATE names all of them for `to`.
        self.origin = torch.from_numpy(origin)
        self._x = torch.from_numpy(here).to(dtype)
        self._v = torch.from_numpy(trajectory.velocities(start)).to(dtype)
        self._target = torch.from_numpy(ahead).to(dtype)
        self._times = windows.times.to(dtype)
        self._row, self._col = graph.row, graph.col
        self._edge_static = edge_static
        scale = numbers.max() if largest_number is None else largest_number
        self._charge = (numbers / scale)[:, None]
        self._eigvecs = graph.eigvecs.to(dtype)
        self._move(torch.device(device))

    _STATE = (
        "origin", "_x", "_v", "_target", "_times", "_row", "_col", "_edge_static", "_charge",
        "_eigvecs",
    )  # fmt: skip

    def _move(self, device: torch.device) -> None:
        for name in self._STATE:
            setattr(self, name, getattr(self, name).to(device))

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self._x.device

    @property
    def index_device(self) -> torch.device:
        """Where `batch` wants its index."""
        return self.device

    @property
    def counts(self) -> list[int]:
        """The number of samples of the one molecule."""
        return [len(self)]

    def to(self, device: torch.device | str) -> WindowDataset:
        """Return the same data set on another device (tensors are shared where they stay)."""
        moved = copy(self)
        moved._move(torch.device(device))
        return moved

    def __len__(self) -> int:
        return int(self._x.shape[0])

    def batch(self, index: Tensor) -> Batch:
        """Gather samples `index`: (B,) int64 on the data set's device, in any order.

        No host synchronisation: the values of `index` are not looked at. Out of range they raise
        IndexError on the CPU and a device-side assertion on CUDA; negative ones do not wrap.

        Raises
        ------
        TypeError, ValueError
            When `index` is not a 1-D int64 tensor on the data set's device, or is empty.
        """
        check_index(index, self.index_device)
        size, num_atoms = index.shape[0], self.num_atoms
        x = self._x.index_select(0, index)
        v = self._v.index_select(0, index)
        speed = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        h = torch.cat([speed, self._charge.expand(size, -1, -1)], dim=-1)
        offset = torch.arange(size, device=self.device)[:, None] * num_atoms
        difference = x.index_select(1, self._row) - x.index_select(1, self._col)
        square = difference.square().sum(dim=-1, keepdim=True)
        edge_fea = torch.cat([self._edge_static.expand(size, -1, -1), square], dim=-1)
        return Batch(
            x=x.reshape(-1, 3),
            h=h.reshape(-1, 2),
            edge_index=((self._row + offset).reshape(-1), (self._col + offset).reshape(-1)),
            edge_fea=edge_fea.reshape(-1, 5),
            v=v.reshape(-1, 3),
            loc_mean=x.mean(dim=1, keepdim=True).expand_as(x).reshape(-1, 3),
            timeframes=self._times.index_select(0, index),
            U_batch=self._eigvecs.expand(size, -1, -1),
            target=self._target.index_select(0, index).transpose(0, 1).reshape(-1, 3),
        )


def check_index(index: object, device: torch.device) -> None:
    """Refuse anything but (B,) int64, B > 0, on the device."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(
            "batch: `index` must be an int64 tensor, got "
            f"{getattr(index, 'dtype', type(index).__name__)}"
        )
    if index.ndim != 1 or index.shape[0] == 0:
        raise ValueError(f"batch: `index` must have shape (B,), B > 0, got {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(
            f"batch: `index` must be on {device}, got {index.device}; move it once, not per batch"
        )


def _check_match(trajectory: Trajectory, graph: MolecularGraph, windows: Windows) -> None:
    if not np.array_equal(graph.numbers.numpy(), trajectory.numbers):
        raise ValueError(
            "WindowDataset: `graph` must be of the trajectory's molecule, got atoms "
            f"{graph.numbers.tolist()} for {trajectory.numbers.tolist()}"
        )
    start, target = windows.start.numpy(), windows.target.numpy()
    rows = np.concatenate([start, target.reshape(-1)])
    if len(start) == 0 or rows.min() < 0 or rows.max() >= trajectory.num_frames:
        raise ValueError(
            f"WindowDataset: `windows` must have rows in 0 … {trajectory.num_frames - 1} and not "
            f"be empty, got {len(start)} windows"
            + (f" with rows {rows.min()} to {rows.max()}" if rows.size else "")
        )
    frames = trajectory.frames
    if not np.array_equal(frames[target] - frames[start][:, None], windows.times.numpy()):
        raise ValueError(
            "WindowDataset: `windows` must have the trajectory's times (frame numbers of target "
            "minus start), got others; draw them from this trajectory"
        )
