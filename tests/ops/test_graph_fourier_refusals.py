"""What the graph Fourier transforms refuse, in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gfnode_fast.ops.graph_fourier import graph_fourier, inverse_graph_fourier
from op_checks import DEVICE, OF_KERNELS

pytestmark = OF_KERNELS
zeros = torch.zeros


def bad(**changes: Any) -> dict[str, Any]:
    fixed = {"signal": zeros(2, 3, 4), "eigvecs": zeros(2, 3, 3), "num_modes": 2}
    return fixed | changes


RAGGED = {"signal": zeros(5, 4), "eigvecs": zeros(13), "ptr": torch.tensor([0, 3, 5])}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(eigvecs=zeros(2, 3, 4)), ValueError, "`eigvecs` must be (B, N, N), got (2, 3, 4)"),
        (bad(eigvecs=zeros(2, 3, 3).int()), TypeError, "must be floating point, got torch.int32"),
        (
            bad(num_modes=4),
            ValueError,
            "`num_modes` must be between 1 and 3, the number of atoms, got 4",
        ),
        (bad(num_modes=0), ValueError, "between 1 and 3"),
        (
            bad(signal=zeros(2, 4, 4)),
            ValueError,
            "`signal` must be (B, N, C) for eigvecs (2, 3, 3)",
        ),
        (bad(signal=zeros(2, 3, 4).double()), TypeError, "`signal` must be torch.float32 like"),
        (bad(signal=zeros(2, 3, 4, device="meta")), ValueError, "`signal` must be on cpu like"),
        (
            bad(backend="cuda"),
            ValueError,
            "`backend` must be one of auto, torch, triton, got 'cuda'",
        ),
        (bad(**RAGGED, num_modes=0), ValueError, "`num_modes` must be at least 1, got 0"),
        (
            bad(**RAGGED | {"eigvecs": zeros(2, 3, 3)}),
            ValueError,
            "`eigvecs` must be (ΣN²,) beside",
        ),
        (bad(**RAGGED | {"eigvecs": zeros(12)}), ValueError, "must have 13 entries"),
        (bad(**RAGGED | {"signal": zeros(2, 3, 4)}), ValueError, "`signal` must be (ΣN, C)"),
        (
            bad(**RAGGED | {"ptr": torch.tensor([0, 3, 5]).int()}),
            TypeError,
            "`ptr` must be torch.int64",
        ),
        (
            bad(**RAGGED | {"ptr": torch.tensor([[0, 3, 5]])}),
            ValueError,
            "`ptr` must be (B+1,), got (1, 3)",
        ),
        (
            bad(**RAGGED | {"ptr": zeros(3, device="meta").long()}),
            ValueError,
            "`ptr` must be on cpu",
        ),
        (bad(**RAGGED | {"ptr": torch.tensor([0, 6, 5])}), ValueError, "must ascend from 0 to 5"),
        (bad(**RAGGED | {"ptr": torch.tensor([0, 3, 4])}), ValueError, "got [0, 3, 4]"),
        (
            {
                "signal": zeros(1, 129, 1, device=DEVICE),
                "eigvecs": zeros(1, 129, 129, device=DEVICE),
                "num_modes": 129,
                "backend": "triton",
            },
            ValueError,
            "`num_modes` must be at most 128 with backend='triton', got 129",
        ),
    ],
)
def test_what_the_forward_transform_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        graph_fourier(**arguments)
    assert str(caught.value).startswith("graph_fourier: ")
    assert message in str(caught.value)


def bad_inverse(**changes: Any) -> dict[str, Any]:
    return {"modes": zeros(2, 2, 2, 4), "eigvecs": zeros(2, 3, 3)} | changes


RAGGED_INVERSE = {"eigvecs": zeros(13), "ptr": torch.tensor([0, 3, 5])}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            bad_inverse(modes=zeros(2, 2, 4)),
            ValueError,
            "`modes` must be (T, B, M, C), got (2, 2, 4)",
        ),
        (bad_inverse(modes=zeros(2, 1, 2, 4)), ValueError, "`modes` must be (T, 2, M, C)"),
        (bad_inverse(modes=zeros(2, 2, 4, 4)), ValueError, "`num_modes` must be between 1 and 3"),
        (bad_inverse(modes=zeros(2, 2, 2, 4).double()), TypeError, "`modes` must be torch.float32"),
        (
            bad_inverse(activation="relu"),
            ValueError,
            "`activation` must be None or 'silu', got 'relu'",
        ),
        (bad_inverse(residual=zeros(2, 3, 5)), ValueError, "`residual` must be (2, 3, 4)"),
        (bad_inverse(centroid=zeros(2, 3, 4)), ValueError, "`centroid` must be (2, 3, 2)"),
        (
            bad_inverse(modes=zeros(2, 2, 2, 3), centroid=zeros(2, 3, 1)),
            ValueError,
            "must have an even number of channels beside a centroid, got 3",
        ),
        (
            bad_inverse(total_atoms=6),
            ValueError,
            "`total_atoms` must be absent without `ptr`, got 6",
        ),
        (bad_inverse(**RAGGED_INVERSE), ValueError, "`total_atoms` must be given with `ptr`"),
        (bad_inverse(**RAGGED_INVERSE, total_atoms=6), ValueError, "`ptr` must ascend from 0 to 6"),
        (
            bad_inverse(backend="cpp"),
            ValueError,
            "`backend` must be one of auto, torch, triton, got 'cpp'",
        ),
    ],
)
def test_what_the_inverse_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        inverse_graph_fourier(**arguments)
    assert str(caught.value).startswith("inverse_graph_fourier: ")
    assert message in str(caught.value)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = bad(backend="triton")
    with pytest.raises(RuntimeError, match="on cpu, where Triton has only its interpreter"):
        graph_fourier(**arguments)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        graph_fourier(**arguments)
