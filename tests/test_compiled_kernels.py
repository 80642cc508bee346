"""The Triton kernels as compiled for sm_80, run on an emulated GPU by tests that know them.

In processes of their own: the other tests run kernels in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")
TESTS = Path(__file__).parent
LAYERS = "ops/test_graph_layers_triton.py::"
SOLVES = "ops/test_propagate_triton.py::"
# Of each family, cases that launch its kernels: forward, backward, molecules of different size.
FAMILIES: dict[str, tuple[tuple[str, ...], str]] = {
    "egnn": (
        (
            LAYERS + "test_molecules_of_different_size[egnn-True-33]",
            LAYERS + "test_reduced_precision_rounds_operands[egnn-bf16]",
            LAYERS + "test_sums_taken_again_in_backward_are_the_same[egnn]",
        ),
        "egnn_layer_fwd egnn_messages egnn_node_bwd egnn_edge_bwd egnn_gather_bwd row_linear "
        "row_outer",
    ),
    "mean": (
        (
            LAYERS + "test_molecules_of_different_size[sage-True-27]",
            LAYERS + "test_reduced_precision_rounds_operands[sage-tf32]",
            LAYERS + "test_sums_taken_again_in_backward_are_the_same[sage]",
        ),
        "mean_layer_fwd mean_neighbours mean_node_bwd mean_edge_bwd mean_summand_bwd",
    ),
    "joint": (
        (SOLVES + "test_joint_is_the_published_solve[3-concat]",),
        "joint_init joint_attempt joint_decide joint_read_fwd joint_read_bwd",
    ),
    "attention": (
        (SOLVES + "test_attention[concat]",),
        "attention_init attention_attempt attention_bwd",
    ),
    "exact": (
        ("ops/test_propagate_exact.py::test_values_and_gradients[dtype0-0.2-True-triton]",),
        "propagate_exact_fwd propagate_exact_bwd",
    ),
    "right-hand sides": (
        (
            "ops/test_mode_rhs.py::test_sizes[17-2-33-attention-triton]",
            "ops/test_mode_rhs.py::test_sizes[17-2-33-concat-triton]",
            "ops/test_mode_rhs.py::test_sizes[17-2-33-no_interaction-triton]",
        ),
        "mode_linear mode_mlp mode_attention_fwd mode_attention_bwd",
    ),
    "transforms": (
        ("ops/test_graph_fourier.py", "-k", "triton and (definition or every_gradient)"),
        "graph_fourier_fwd inverse_graph_fourier_fwd inverse_graph_fourier_bwd "
        "graph_fourier_eigvecs_bwd",
    ),
    "the emulated GPU itself": (("ptx_probes.py",), "rotate product"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_and_emulated(family: str, tmp_path: Path) -> None:
    cases, kernels = FAMILIES[family]
    report = tmp_path / "launched.json"
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    environment["GFNODE_EMULATED_LAUNCHES"] = str(report)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "on_ptx", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *cases], capture_output=True, text=True, env=environment, cwd=TESTS
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert {f"_{name}_kernel" for name in kernels.split()} <= set(json.loads(report.read_text()))


def test_every_kernel_is_in_a_family() -> None:
    from gfnode_fast.kernels.registry import entry_kernels

    named = {f"_{name}_kernel" for _, kernels in FAMILIES.values() for name in kernels.split()}
    assert {name.rsplit(".", 1)[1] for name in entry_kernels()} <= named
