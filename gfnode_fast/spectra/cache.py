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
        which: Tensor | None = None,
        canonical: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Spectrum:
        """What `graph_spectrum` gives for the same arguments, bit for bit.

        Args:
            graphs, kind, canonical, dtype: as there.
            which: (K,) int64, the spectra of `graphs.select(which)` instead, without making its
                edges: the way for a training loop, which makes `graphs` of its molecules once. All
                found, the time is that of gathering K matrices; with edge lists made for the batch
                it is mostly that of checking and sorting them.

        Raises:
            TypeError, ValueError: as `graph_spectrum` and `Graphs.select`.

        Notes:
            The result may be shared, with the cache and between equal graphs: do not change it in
            place.
        """
        if which is not None:
            graphs.check_numbers("spectrum", which)
        keys, numbers, distinct = graphs.distinct
        if which is not None:
            numbers = numbers[which]
        if len(numbers) == 0:
            none = graphs.select(numbers)
            return graph_spectrum(none, kind, canonical=canonical, dtype=dtype)
        present, numbers = numbers.unique(return_inverse=True)
        keys = [keys[k] for k in present.tolist()]
        settings = (kind, canonical, dtype, graphs.row.device)
        with self._lock:
            found = {key: self._remembered((key, *settings)) for key in keys}
            missing = [k for k, key in enumerate(keys) if found[key] is None]
            self._counters["hits"] += len(keys) - len(missing)
            if missing:
                solved = self._solve(keys, distinct.select(present), missing, kind, canonical)
                for k, (w, U) in zip(missing, solved, strict=True):
                    spectrum = Spectrum(*(x.to(graphs.row.device, dtype) for x in (w, U)))
                    self._remember((keys[k], *settings), spectrum)
                    found[keys[k]] = spectrum
        w, U = _padded([spectrum for spectrum in found.values() if spectrum is not None])
        if len(keys) == 1:
            return Spectrum(w.expand(len(numbers), -1), U.expand(len(numbers), -1, -1))
        return Spectrum(w.index_select(0, numbers), U.index_select(0, numbers))

    def _remembered(self, key: tuple[Any, ...]) -> Spectrum | None:
        spectrum = self._spectra.get(key)
        if spectrum is not None:
            self._spectra.move_to_end(key)
        return spectrum

    def _remember(self, key: tuple[Any, ...], spectrum: Spectrum) -> None:
        if _bytes(spectrum) > self.max_bytes:  # would drop all others, and itself
            return
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


_SHARED = SpectralCache(64 << 20)


def shared_cache() -> SpectralCache:
    """The process's own cache, 64 MiB in memory: `gfnode_fast.data.build_graph` solves through it,
    so that a molecule which is prepared again, for another run, split or number of modes, is not.
    """
    return _SHARED


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


def _padded(spectra: list[Spectrum]) -> Spectrum:
    """Stack spectra of different size, zero beyond each one's own."""
    n = max(len(spectrum.w) for spectrum in spectra)
    if all(len(spectrum.w) == n for spectrum in spectra):
        return Spectrum(*(torch.stack(parts) for parts in zip(*spectra, strict=True)))
    w = spectra[0].w.new_zeros(len(spectra), n)
    U = spectra[0].U.new_zeros(len(spectra), n, n)
    for k, spectrum in enumerate(spectra):
        size = len(spectrum.w)
        w[k, :size] = spectrum.w
        U[k, :size, :size] = spectrum.U
    return Spectrum(w, U)
