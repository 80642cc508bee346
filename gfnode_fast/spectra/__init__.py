"""Graph spectra: Laplacians, eigenvectors that are the same everywhere, and a cache of them."""

from gfnode_fast.spectra.cache import SpectralCache, shared_cache
from gfnode_fast.spectra.canonical import canonical_basis, eigenspaces
from gfnode_fast.spectra.gaps import SpectralGapReport, spectral_gap_report
from gfnode_fast.spectra.graphs import Graphs
from gfnode_fast.spectra.laplacian import graph_laplacian
from gfnode_fast.spectra.spectrum import Spectrum, graph_spectrum

__all__ = [
    "Graphs",
    "SpectralCache",
    "SpectralGapReport",
    "Spectrum",
    "canonical_basis",
    "eigenspaces",
    "graph_laplacian",
    "graph_spectrum",
    "shared_cache",
    "spectral_gap_report",
]
