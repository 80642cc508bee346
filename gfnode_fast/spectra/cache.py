"""Spectra that have been computed before."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.spectra.canonical import SAME_EIGENVALUE, SAME_ENTRY
from gfnode_fast.spectra.graphs import Graphs
from gfnode_fast.spectra.laplacian import Kind
from gfnode_fast.spectra.spectrum import Spectrum, graph_spectrum
from gfnode_fast.spectra.store import SpectralStore

ALGORITHM = 1
"""Of what files hold. To be raised with every change after which the solver or the canonical rule
may give another basis, so that older files are not found.
"""

_ALL: weakref.WeakSet[SpectralCache] = weakref.WeakSet()


class SpectralCache:
    """`graph_spectrum` that solves each graph once.

    Args:
        max_bytes: the least recently used spectra go when they take more than this.
        directory: keep float64 spectra in files there too, across runs and processes; they need
            safetensors. None: memory only. Files of an older algorithm (`ALGORITHM`) stay and are
            not read.

    Raises:
        ValueError: max_bytes is negative.

    Notes:
        A graph is known by its exact nodes, edges and weights (in any order of edges), the kind of
        Laplacian, dtype, device and whether the basis is canonical. The same `Graphs` object is
        looked at once. Thread-safe. `gfnode_fast.info()["spectra"]` sums the counters of all caches
        that live.
    """

    def __init__(self, max_bytes: int = 256 << 20, directory: str | Path | None = None) -> None:
        if max_bytes < 0:
            raise ValueError(f"SpectralCache: `max_bytes` must not be negative, got {max_bytes}")
        self.max_bytes = max_bytes
        self.store = None if directory is None else SpectralStore(directory)
        self._spectra: OrderedDict[tuple[Any, ...], Spectrum] = OrderedDict()
        self._lock = threading.RLock()
        self._counters = {"hits": 0, "solved": 0, "read": 0, "evicted": 0, "bytes": 0}
        _ALL.add(self)

    def counters(self) -> dict[str, int]:
        """Graphs found in memory, solved, read from disk and dropped, and bytes held."""
        with self._lock:
            return dict(self._counters)

    def spectrum(
        self,
        graphs: Graphs,
        kind: Kind = "combinatorial",
        *,
        canonical: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Spectrum:
        """What `graph_spectrum` gives for the same arguments, bit for bit.

        Notes:
            The result may be shared, with the cache and between equal graphs: do not change it in
            place.
        """
        if len(graphs) == 0:
            return graph_spectrum(graphs, kind, canonical=canonical, dtype=dtype)
        keys, which, distinct = graphs.distinct
        settings = (kind, canonical, dtype, graphs.row.device)
        with self._lock:
            found = [self._remembered((key, *settings)) for key in keys]
            missing = [k for k, spectrum in enumerate(found) if spectrum is None]
            self._counters["hits"] += len(keys) - len(missing)
            if missing:
                solved = self._solve(keys, distinct, missing, kind, canonical)
                for k, (w, U) in zip(missing, solved, strict=True):
                    spectrum = Spectrum(*(x.to(graphs.row.device, dtype) for x in (w, U)))
                    self._remember((keys[k], *settings), spectrum)
                    found[k] = spectrum
        w, U = _padded([spectrum for spectrum in found if spectrum is not None], graphs.largest)
        if len(keys) == len(graphs):
            return Spectrum(w, U)
        if len(keys) == 1:
            return Spectrum(w.expand(len(graphs), -1), U.expand(len(graphs), -1, -1))
        return Spectrum(w[which], U[which])

    def _remembered(self, key: tuple[Any, ...]) -> Spectrum | None:
        spectrum = self._spectra.get(key)
        if spectrum is not None:
            self._spectra.move_to_end(key)
        return spectrum

    def _remember(self, key: tuple[Any, ...], spectrum: Spectrum) -> None:
        self._spectra[key] = spectrum
        self._counters["bytes"] += _bytes(spectrum)
        while self._counters["bytes"] > self.max_bytes:
            _, dropped = self._spectra.popitem(last=False)
            self._counters["bytes"] -= _bytes(dropped)
            self._counters["evicted"] += 1

    def _solve(
        self, keys: list[bytes], distinct: Graphs, missing: list[int], kind: Kind, canonical: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Float64 spectra of the missing graphs, each of its own size: from disk, else solved."""
        solved: dict[int, tuple[Tensor, Tensor]] = {}
        names = {k: _file_name(keys[k], kind, canonical) for k in missing}
        if self.store is not None:
            for k in missing:
                if (pair := self.store.read(names[k])) is not None:
                    solved[k] = pair
            self._counters["read"] += len(solved)
        rest = [k for k in missing if k not in solved]
        if rest:
            graphs = distinct.select(torch.tensor(rest, device=distinct.row.device))
            spectra = graph_spectrum(graphs, kind, canonical=canonical, dtype=torch.float64)
            self._counters["solved"] += len(rest)
            for k, n, w, U in zip(rest, graphs.sizes.tolist(), *spectra, strict=True):
                solved[k] = w[:n].clone(), U[:n, :n].clone()
                if self.store is not None:
                    self.store.write(names[k], *(x.cpu() for x in solved[k]))
        return [solved[k] for k in missing]


def counters_of_all() -> dict[str, int]:
    """Sums over all caches that live."""
    total = {"caches": 0, "hits": 0, "solved": 0, "read": 0, "evicted": 0, "bytes": 0}
    for cache in list(_ALL):
        total["caches"] += 1
        for name, value in cache.counters().items():
            total[name] += value
    return total


def _bytes(spectrum: Spectrum) -> int:
    return sum(x.nbytes for x in spectrum)


def _file_name(key: bytes, kind: Kind, canonical: bool) -> str:
    """A name that changes with everything the values depend on."""
    rule = f"{SAME_EIGENVALUE} {SAME_ENTRY}" if canonical else "solver's basis"
    return hashlib.sha256(key + f"{ALGORITHM} {kind} {rule}".encode()).hexdigest()


def _padded(spectra: list[Spectrum], n: int) -> Spectrum:
    """Stack spectra of different size, zero beyond each one's own."""
    if all(len(spectrum.w) == n for spectrum in spectra):
        return Spectrum(*(torch.stack(parts) for parts in zip(*spectra, strict=True)))
    w = spectra[0].w.new_zeros(len(spectra), n)
    U = spectra[0].U.new_zeros(len(spectra), n, n)
    for k, spectrum in enumerate(spectra):
        size = len(spectrum.w)
        w[k, :size] = spectrum.w
        U[k, :size, :size] = spectrum.U
    return Spectrum(w, U)
