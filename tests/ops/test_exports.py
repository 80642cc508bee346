"""`gfnode_fast.ops` is its functions, modules of the same name notwithstanding."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import gfnode_fast.ops as ops


def test_every_function_is_there() -> None:
    for name in ops.__all__:
        exported = getattr(ops, name)
        assert callable(exported), name
        assert inspect.getdoc(exported), name


def test_modules_of_the_same_name_stay_reachable() -> None:
    for name in ("graph_fourier", "mode_rhs", "propagate", "propagate_exact", "propagate_joint"):
        module = importlib.import_module(f"gfnode_fast.ops.{name}")
        assert inspect.ismodule(module)
        assert getattr(ops, name) is getattr(module, name)


def test_importing_takes_neither_triton_nor_a_compiler() -> None:
    heavy = ("triton", "torch._dynamo", "torch._inductor", "gfnode_fast._C")
    found = f"[m for m in {heavy} if m in sys.modules]"
    command = f"import sys, gfnode_fast.ops; sys.exit(str({found}))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
