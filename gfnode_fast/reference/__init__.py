"""The oracle: GF-NODE (arXiv 2411.01600) in plain PyTorch, quirks and costs of the published model
included.

Everything fast in this package is measured against this code, for its numbers and for its time
(baseline U0). It depends on torch and torchdiffeq alone.
"""

from gfnode_fast.reference.layers import EGNNLayer, GCNLayer, SAGELayer
from gfnode_fast.reference.model import FourierMD
from gfnode_fast.reference.propagator import ModeODE, ModeRHS, Propagator
from gfnode_fast.reference.time_embedding import frame_embedding

__all__ = [
    "EGNNLayer",
    "FourierMD",
    "GCNLayer",
    "ModeODE",
    "ModeRHS",
    "Propagator",
    "SAGELayer",
    "frame_embedding",
]
