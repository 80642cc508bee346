"""GF-NODE (Graph Fourier Neural ODEs, arXiv 2411.01600) at hardware speed."""

from gfnode_fast import data, ops, reference, solvers
from gfnode_fast._version import __version__
from gfnode_fast.info import info
from gfnode_fast.nn import GFNODE, FourierMD, accelerate, capture_training_step, restore
from gfnode_fast.training import evaluate, predict, train

__all__ = [
    "GFNODE",
    "FourierMD",
    "__version__",
    "accelerate",
    "capture_training_step",
    "data",
    "evaluate",
    "info",
    "ops",
    "predict",
    "reference",
    "restore",
    "solvers",
    "train",
]
