"""Modules with the reference's parameters and a faster forward."""

from gfnode_fast.nn.accelerate import accelerate, restore
from gfnode_fast.nn.capture import capture_training_step
from gfnode_fast.nn.fourier_md import FourierMD
from gfnode_fast.nn.gfnode import GFNODE

__all__ = ["GFNODE", "FourierMD", "accelerate", "capture_training_step", "restore"]
