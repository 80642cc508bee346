"""Triton kernels and their launchers, installed as `gfnode_fast.kernels`.

Checks, dispatch and autograd belong to `gfnode_fast.ops`; nothing here is public.
"""
