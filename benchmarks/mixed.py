"""A training step on a batch of two molecules: without padding, one after the other, padded.

    python benchmarks/mixed.py [--device cuda] [--json OUT] [--batches 50 200 512] [--backend auto]

mixed    `GFNODE` on flat atoms with offsets, as `gfnode-fast train --data.molecules` runs it
apart    `FourierMD` on each molecule's windows in turn, gradients added up
padded   `FourierMD` on the same windows, every molecule filled up to the largest with atoms
         without edges, which loss and centroids leave out

Half of the windows are of aspirin (13 heavy atoms), half of ethanol (3). Forward and backward with
published sizes; drawing the batch is part of the first two, padding is done beforehand. Timed only
if the three losses agree.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported

import torch
from torch import Tensor, nn

from benchmarks import training_runs
from benchmarks.formatting import heading
from benchmarks.inputs import DELTA_FRAME, NUM_TIMES, SEED
from benchmarks.timing import interleaved, peak_memory, ratio
from benchmarks.training_tables import mixed_table
from gfnode_fast.data import MixedBatch, MixedDataset
from gfnode_fast.training import DataConfig, ModelConfig, TrainConfig
from gfnode_fast.training.molecules import Molecules
from gfnode_fast.training.problem import build_model

BATCHES = (50, 200, 512)
AGREEMENT = 1e-3  # of losses; joint steps follow from the molecules solved together


def config(batch: int, model: ModelConfig) -> TrainConfig:
    molecules: list[str | dict[str, Any]] = ["sample:aspirin", "sample:ethanol"]
    data = DataConfig(
        molecules=molecules,
        num_timesteps=NUM_TIMES,
        delta_frame=DELTA_FRAME,
        train_size=-(-batch // 2),
        val_size=1,
        test_size=1,
        seed=SEED,
    )
    return TrainConfig(data=data, model=model)


def padded(batch: MixedBatch) -> tuple[dict[str, Any], Tensor]:
    """`FourierMD`'s arguments with every molecule of the largest size, and the true atoms' rows."""
    device, dtype = batch.x.device, batch.x.dtype
    sizes, molecules = batch.ptr.diff(), len(batch.ptr) - 1
    width = int(sizes.max())
    rows = torch.cat([b * width + torch.arange(int(n)) for b, n in enumerate(sizes)]).to(device)

    def spread(values: Tensor) -> Tensor:
        out = torch.zeros(molecules * width, values.shape[-1], dtype=dtype, device=device)
        return out.index_copy(0, rows, values)

    eigvecs = torch.zeros(molecules, width, width, dtype=dtype, device=device)
    for b, (n, part) in enumerate(
        zip(sizes.tolist(), batch.eigvecs.split(sizes.square().tolist()), strict=True)
    ):
        eigvecs[b, :n, :n] = part.view(n, n)
    centres = torch.cat(
        [part.mean(0, keepdim=True).expand_as(part) for part in batch.x.split(sizes.tolist())]
    )
    inputs = {
        "x": spread(batch.x),
        "h": spread(batch.h),
        "v": spread(batch.v),
        "edge_index": (rows[batch.edge_index.row], rows[batch.edge_index.col]),
        "edge_fea": batch.edge_fea,
        "loc_mean": spread(centres),
        "timeframes": batch.timeframes,
        "U_batch": eigvecs,
    }
    return inputs, rows


def contenders(
    batch: int, device: torch.device, model: ModelConfig
) -> dict[str, Callable[[], float]]:
    """Each runs forward and backward and returns the loss, read from the device."""
    run = config(batch, model)
    molecules = Molecules(run)
    dataset = molecules.dataset("train", dtype=torch.float32, device=device)
    assert isinstance(dataset, MixedDataset)
    own = [
        problem.dataset("train", dtype=torch.float32, device=device, largest_number=8)
        for problem in molecules.problems.values()
    ]
    torch.manual_seed(SEED)
    joined = build_model(run, molecules.num_atoms)
    state = joined.state_dict()

    def single(name: str, num_atoms: int) -> nn.Module:
        found = build_model(TrainConfig(data=run.data.by_molecule()[name], model=model), num_atoms)
        found.load_state_dict(state)
        return found.to(device)

    joined = joined.to(device)
    apart = [single(name, problem.graph.num_atoms) for name, problem in molecules.problems.items()]
    index = torch.arange(len(dataset))
    fixed = dataset.batch(index)
    inputs, rows = padded(fixed)
    wide = single("aspirin", inputs["U_batch"].shape[1])

    def finished(model: nn.Module, loss: Tensor) -> float:
        model.zero_grad(set_to_none=True)
        loss.backward()
        return float(loss.detach())

    def run_mixed() -> float:
        drawn = dataset.batch(index)
        return finished(joined, drawn.loss(joined(**drawn.inputs())[0]))

    def run_apart() -> float:
        total = 0.0
        for part, alone in zip(own, apart, strict=True):
            drawn = part.batch(torch.arange(len(part), device=device))
            loss = drawn.loss(alone(**drawn.inputs())[0]) * len(part) / len(index)
            total += finished(alone, loss)
        return total

    def run_padded() -> float:
        answer = wide(**inputs)[0].view(NUM_TIMES, -1, 3)
        return finished(wide, fixed.loss(answer.index_select(1, rows)))

    return {"mixed": run_mixed, "apart": run_apart, "padded": run_padded}


def measure(
    batches: tuple[int, ...],
    device: torch.device,
    model: ModelConfig,
    *,
    rounds: int = 7,
    seconds_each: float = 10.0,
) -> dict[str, Any]:
    """Every batch size in turn.

    Raises:
        RuntimeError: losses that differ.
    """
    found = []
    for batch in batches:
        training_runs.progress(f"B = {batch}")
        runs = contenders(batch, device, model)
        losses = {name: run() for name, run in runs.items()}
        if max(losses.values()) - min(losses.values()) > AGREEMENT * losses["apart"]:
            raise RuntimeError(f"mixed: `losses` must agree, got {losses}; nothing was timed")
        timings = interleaved(runs, device, rounds=rounds, seconds_each=seconds_each)
        entries = {
            name: {**timings[name].summary(), "peak_bytes": peak_memory(runs[name], device)}
            for name in runs
        }
        ratios = {name: ratio(timings[name], timings["mixed"]) for name in ("apart", "padded")}
        found.append({"batch": batch, "losses": losses, "contenders": entries, "faster": ratios})
    return {"backend": model.backend, "batches": found}


def main(arguments: list[str] | None = None) -> int:
    parser = training_runs.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--backend", default="auto", help="model.backend")
    options = parser.parse_args(arguments)
    device = training_runs.chosen_device(options)
    model = ModelConfig(backend=options.backend)

    def run(_: Path) -> dict[str, Any]:
        return measure(tuple(options.batches), device, model)

    result = training_runs.measured("mixed.py", arguments, device, run)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(heading(result["about"]), mixed_table(result), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
