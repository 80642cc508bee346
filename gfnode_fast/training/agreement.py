"""Does the fast model agree with the reference on somebody's weights, and how fast are both?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfnode_fast import reference
from gfnode_fast.data import WindowDataset, draw_windows
from gfnode_fast.nn import FourierMD
from gfnode_fast.training.checkpoint import CheckpointError
from gfnode_fast.training.config import DataConfig
from gfnode_fast.training.problem import (
    EDGE_FEATURES,
    NODE_FEATURES,
    forked_random_state,
    molecule_graph,
    read_trajectory,
    resolve_device,
)
from gfnode_fast.training.published import infer_arguments, read_state_dict

# Differences in single precision are compared with these, relative to the largest magnitude.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Agreement:
    """What :func:`check_checkpoint` found.

    Attributes:
        checkpoint, trajectory, device: what was run on what.
        arguments: of the constructor.
        assumed: those of them that the weights do not tell.
        backend, backend_reason: of the fast model.
        errors: output name to the largest difference between the fast model and the reference in
            float32, divided by the reference's largest magnitude.
        rounding: the same between the reference in float32 and in float64, for scale; empty for a
            VAE.
        reference_ms, fast_ms: median time of a forward pass.
        batch_size: windows in it.
    """

    checkpoint: str
    trajectory: str
    device: str
    arguments: dict[str, Any]
    assumed: list[str]
    backend: str
    backend_reason: str
    errors: dict[str, float]
    rounding: dict[str, float]
    reference_ms: float
    fast_ms: float
    batch_size: int

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance or the reference's own rounding."""
        return all(
            error <= max(TOLERANCE, 3 * self.rounding.get(name, 0.0))
            for name, error in self.errors.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "passed": self.passed}


def check_checkpoint(
    checkpoint: str | Path,
    *,
    data: DataConfig | None = None,
    time_mode: str | None = None,
    solver: str = "dopri5",
    rtol: float = 1e-3,
    atol: float = 1e-4,
    norm: bool = False,
    propagate_x: bool = True,
    propagate_h: bool = True,
    no_fourier: bool = False,
    no_ode: bool = False,
    backend: str = "auto",
    batch_size: int = 10,
    repeats: int = 3,
    device: str = "auto",
) -> Agreement:
    """Run reference and fast model with the same weights on the same windows.

    Args:
        checkpoint: a published ``state_dict`` (``torch.save`` or safetensors), or a checkpoint of
            this package. Weights only: code in a file is never run.
        data: trajectory and windows; default: the shipped aspirin sample. The molecule need not be
            the one of the training; it needs ``num_modes`` atoms.
        time_mode, solver, rtol, atol, norm, propagate_x, propagate_h, no_fourier, no_ode: what the
            weights do not tell, with the published defaults.
        backend: of the fast model.
        batch_size, repeats: windows per pass, and passes timed.
        device: where to run.

    Raises:
        CheckpointError: not the state_dict of a FourierMD. ValueError, TypeError: options that do
        not fit the weights or the molecule.
    """
    for name, count in (("batch_size", batch_size), ("repeats", repeats)):
        if count < 1:
            raise ValueError(f"check: `{name}` must be at least 1, got {count}; raise it")
    state = read_state_dict(checkpoint)
    arguments = infer_arguments(state, time_mode=time_mode)
    for name, width in (("in_node_nf", NODE_FEATURES), ("in_edge_nf", EDGE_FEATURES)):
        if arguments[name] != width:
            raise ValueError(
                f"check: `{name}` must be {width}, the published features that the data have, "
                f"got {arguments[name]} in {checkpoint}; call the models on your own features"
            )
    data = data or DataConfig()
    stated = {
        "solver": solver,
        "rtol": rtol,
        "atol": atol,
        "norm": norm,
        "propagate_x": propagate_x,
        "propagate_h": propagate_h,
        "no_fourier": no_fourier,
        "no_ode": no_ode,
        "delta_frame": data.delta_frame,
        "num_timesteps": data.num_timesteps,
    }
    arguments |= stated
    if no_fourier:
        arguments["fourier_basis"] = None
    trajectory = read_trajectory(data)
    windows = draw_windows(
        trajectory,
        num_timesteps=data.num_timesteps,
        delta_frame=data.delta_frame,
        sampling=data.sampling,
        split=data.split,
        sizes=(batch_size, 1, 1),
        fractions=data.fractions,
        seed=data.seed,
    )["train"]
    graph = molecule_graph(trajectory, data)
    place = resolve_device(device)
    keywords = {**arguments, "with_v": True, "num_atoms": trajectory.num_atoms}

    def batch(dtype: torch.dtype) -> dict[str, Any]:
        dataset = WindowDataset(trajectory, graph, windows, dtype=dtype, device=place)
        return dataset.batch(torch.arange(batch_size, device=place)).inputs()

    with forked_random_state(place):
        oracle = reference.FourierMD(**keywords)
        try:
            oracle.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"check: `checkpoint` must be the whole state_dict of one FourierMD, got "
                f"{checkpoint}, whose weights do not fit each other "
                f"({' '.join(str(error).split())}); save model.state_dict()"
            ) from error
        fast = FourierMD(**keywords, backend=backend)
        fast.load_state_dict(state)
        single = batch(torch.float32)
        exact = _outputs(oracle.to(place, torch.float64).eval(), batch(torch.float64))
        oracle, fast = oracle.to(place, torch.float32).eval(), fast.to(place).eval()
        expected, found = _outputs(oracle, single), _outputs(fast, single)
        reference_ms = _median_ms(lambda: _outputs(oracle, single), repeats, place)
        fast_ms = _median_ms(lambda: _outputs(fast, single), repeats, place)
    return Agreement(
        checkpoint=str(checkpoint),
        trajectory=data.trajectory,
        device=str(place),
        arguments=arguments,
        assumed=sorted(stated),
        backend=fast.backend,
        backend_reason=fast.backend_reason,
        errors=_relative(found, expected),
        # In another precision the VAE draws other noise, which says nothing of rounding.
        rounding={} if oracle.use_vae else _relative(expected, exact),
        reference_ms=reference_ms,
        fast_ms=fast_ms,
        batch_size=batch_size,
    )


def _outputs(model: reference.FourierMD, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The named outputs; the VAE's noise starts from the same seed each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(zip(("x", "v", "h", "kld"), model(**inputs), strict=True))


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    errors = {}
    for name, value in expected.items():
        scale = value.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        errors[name] = float((found[name].double() - value.double()).abs().max() / scale)
    return errors


def _median_ms(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 1e3 * float(torch.tensor(times).median())
