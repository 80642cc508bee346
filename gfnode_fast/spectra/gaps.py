"""Does a number of modes cut an eigenspace?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gfnode_fast.spectra.canonical import eigenspaces


@dataclass(frozen=True)
class SpectralGapReport:
    """Eigenspaces of one graph and where M falls.

    Attributes:
        num_modes: M.
        spaces: per eigenspace (eigenvalue, first mode, number of modes), ascending.
        cuts: whether the first M modes hold a part of an eigenspace only: then they depend on the
            basis chosen inside it.
        safe_below, safe_above: the nearest M that cut nothing; M itself where it is safe.
        gap: eigenvalue M less eigenvalue M - 1, inf when all modes are taken.
    """

    num_modes: int
    spaces: tuple[tuple[float, int, int], ...]
    cuts: bool
    safe_below: int
    safe_above: int
    gap: float

    @property
    def nearest_safe(self) -> int:
        """The nearest M ≥ 1 that cuts nothing, the larger one of two."""
        below, above = self.num_modes - self.safe_below, self.safe_above - self.num_modes
        return self.safe_below if 0 < below < above and self.safe_below > 0 else self.safe_above

    def __str__(self) -> str:
        if not self.cuts:
            return f"{self.num_modes} modes cut no eigenspace; the gap after them is {self.gap:.4g}"
        value, first, count = next(s for s in self.spaces if s[1] < self.num_modes < s[1] + s[2])
        return (
            f"{self.num_modes} modes cut the eigenspace of eigenvalue {value:.4g}, modes {first} "
            f"to {first + count - 1}: the basis inside it is arbitrary, and with it the model; "
            f"{self.nearest_safe} modes are the nearest safe number"
        )


def spectral_gap_report(w: Tensor, num_modes: int) -> SpectralGapReport:
    """Look where the first M modes end.

    Args:
        w: (n,) ascending eigenvalues of one graph.
        num_modes: M, from 1 to n.

    Raises:
        ValueError: shapes, or M out of range.

    Notes:
        Eigenvalues within 1e-8 of the largest count as equal, as in `canonical_basis`; give them in
        float64. Example: benzene's heavy atoms have 0, 4, 4, 4, 6, 6, so that M = 2 cuts.
    """
    if w.dim() != 1:
        raise ValueError(f"spectral_gap_report: `w` must be (n,), got {tuple(w.shape)}")
    if not 1 <= num_modes <= len(w):
        raise ValueError(
            f"spectral_gap_report: `num_modes` must be in 1 … {len(w)}, got {num_modes}"
        )
    _, counts = torch.unique_consecutive(eigenspaces(w[None])[0], return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    values = w.double().tolist()
    spaces = tuple((values[begin], begin, end - begin) for begin, end in pairwise(ends))
    return SpectralGapReport(
        num_modes=num_modes,
        spaces=spaces,
        cuts=num_modes not in ends,
        safe_below=max(end for end in ends if end <= num_modes),
        safe_above=min(end for end in ends if end >= num_modes),
        gap=values[num_modes] - values[num_modes - 1] if num_modes < len(w) else float("inf"),
    )
