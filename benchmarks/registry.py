"""Every row of the bench: what is computed, at which size, in which precision, and who competes.

A row is data. `operations` turns a row and a contender into something that can be run, checked and
timed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

MODELS: dict[str, dict[str, str]] = {
    "egnn": {
        "gnn_ablation_mode": "EGNN", "mode_interaction": "no_interaction", "time_mode": "none",
    },
    "sage_attention_concat": {
        "gnn_ablation_mode": "GraphSAGE", "mode_interaction": "attention", "time_mode": "concat",
    },
}  # fmt: skip
OPERATIONS = (
    "model",
    "propagation",  # both propagators: transforms and solve, features and vectors
    "encoder",
    "decoder",
    "solve",  # the features' ODE alone
    "graph_fourier",
    "inverse_graph_fourier",
    "eigh",
    "spectrum",  # of B graphs, molecules of a few numberings, in the canonical basis
    "graph_layer",
)
UNION_OPERATIONS = ("model", "propagation", "solve")  # in which U0 walks all molecules' times
PEPTIDE = "peptide "
SPECTRA = ("eigh", "spectrum")  # rows of graphs, without a model
PHASES = ("forward", "backward", "step")  # backward: forward + backward; step: those + Adam
TIMES = ("irregular", "regular")
PRECISIONS = ("fp64", "fp32", "tf32", "bf16")
BASELINES = ("U0", "U1", "C1")
EAGER_LOOP = "ours eager loop"  # what "ours compiled" is compared with besides the baselines
# CUDA graphs of the Triton contenders: of the whole step, or of a solve alone.
CAPTURED, CAPTURED_EXACT, CAPTURED_SOLVE = "ours captured", "ours exact captured", "solve captured"
CUDA_SOLVER = "ours cuda"  # "ours" takes it only on families with a committed result
FORMS = {"ours triton whole": 1, "ours triton tiles": None}
"""The forms of the layers' forward kernels, and the size of a molecule that leads to each."""
SUMS_KEPT = "ours triton sums kept"  # over neighbours, which otherwise only small batches keep
MORE_ATTEMPTS = "ours triton 64 attempts"  # launched, of which a solve here takes 2 to 4
STAGES = {"egnn": ("ours stages",)}  # where "ours" is not stage by stage
ALONE = (800, 1600, 6400)  # batches that take the baselines minutes to hours on a CPU


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Attributes:
        op, phase, model, times, precision: of OPERATIONS, PHASES, MODELS, TIMES, PRECISIONS.
        batch, num_modes: B, M. Other widths are the published ones (K 64, Kt 32, T 8, 5 + 5
        layers). molecule: shipped sample, "peptide N" of the large systems, or "random N" for op
        rows that need only a size.
    """

    op: str
    phase: str
    batch: int
    num_modes: int = 2
    model: str = "egnn"
    times: str = "irregular"
    precision: str = "fp32"
    molecule: str = "aspirin"

    def __post_init__(self) -> None:
        for name, choices in (
            ("op", OPERATIONS),
            ("phase", PHASES),
            ("model", tuple(MODELS)),
            ("times", TIMES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Row: `{name}` must be one of {choices}, got {getattr(self, name)!r}; "
                    "correct the name"
                )

    @property
    def name(self) -> str:
        parts = [self.op, self.phase]
        if self.op in SPECTRA:
            return " ".join([*parts, self.molecule, f"B={self.batch}", self.precision])
        parts += [self.molecule] if self.molecule.startswith(PEPTIDE) else []
        parts += [self.model, f"M={self.num_modes}", f"B={self.batch}"]
        return " ".join([*parts, self.times, self.precision])

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def tiny(self) -> Row:
        """The same row at a size that a CPU runs in a moment; precisions of GPUs become fp32."""
        precision = self.precision if self.precision == "fp64" else "fp32"
        molecule = self.molecule if self.op in SPECTRA else "ethanol"
        return replace(self, batch=min(self.batch, 2), precision=precision, molecule=molecule,
                       num_modes=min(self.num_modes, 2))  # fmt: skip


def contenders(row: Row, device: str = "cpu") -> tuple[str, ...]:
    """Who runs in a row on a kind of device, baselines first; our GPU kernels last."""
    if device != "cuda":
        return _everywhere(row)
    ours = _of_triton(row)
    if row.op in SPECTRA:
        ours = (CUDA_SOLVER,) if row.op == "eigh" else ()
    names = _everywhere(row) + ours
    return tuple(name for name in names if row in GPU_ROWS_OF.get(name, (row,)))


def _of_triton(row: Row) -> tuple[str, ...]:
    if (row.op, row.phase) == ("graph_layer", "forward"):
        return ("ours triton", *FORMS)
    if row.op == "solve":
        return ("ours triton", MORE_ATTEMPTS, CAPTURED_SOLVE)
    exact = row.model == "egnn" and row.op in ("model", "propagation")
    triton = ("ours triton", "ours exact triton") if exact else ("ours triton",)
    if (row.op, row.phase) == ("model", "step"):
        triton += (SUMS_KEPT, CAPTURED, CAPTURED_EXACT) if exact else (CAPTURED,)
    return triton


def _everywhere(row: Row) -> tuple[str, ...]:
    if row.op == "eigh":
        return ("torch", "numpy loop", "ours", *_two_threads(row))
    if row.op == "spectrum":
        return ("torch", "ours", *CACHED)
    if row.op in ("graph_fourier", "inverse_graph_fourier"):
        return ("U1", "sliced", "ours")
    if row.op == "graph_layer":
        return ("U1", "C1", "ours", *_two_threads(row))
    if row.op in ("encoder", "decoder"):
        return ("U1", "C1", "ours")
    ours: tuple[str, ...] = ("ours", "ours exact") if row.model == "egnn" else ("ours",)
    if (row.op, row.phase, row.model, row.batch) == ("model", "step", "egnn", 100):
        ours += ("ours recompute",)
    if row in WHOLE_MODEL_ROWS:
        ours += (WHOLE_COMPILED,)
    if row.batch in ALONE:
        return ours if row.op == "propagation" else ("ours", "ours recompute")
    if row.op == "solve":
        loops = (*STAGES.get(row.model, ()), EAGER_LOOP, "ours compiled")
        if row.batch == 200:
            return ("U1", "ours", *loops)
        peers = ("torchode",) if row.model == "egnn" else ()
        return (*BASELINES, *peers, *ours, *loops)
    return (*BASELINES, *ours)


def _two_threads(row: Row) -> tuple[str, ...]:
    return (TWO_THREADS,) if row in TWO_THREAD_ROWS else ()


CACHED = ("ours cached, known graphs", "ours cached, edge lists")
"""How a batch is made whose spectra are all in the cache: anew from known graphs, or from edges."""
TWO_THREADS = "ours two threads"
TWO_THREAD_ROWS = [
    *(Row("eigh", "forward", 4096, molecule=f"random {n}") for n in (6, 13, 32, 64)),
    *(Row("graph_layer", "backward", 50, model=model) for model in MODELS),
]

# Whether a training step gains from torch.compile(model) on the CPU, at sizes that no GPU row has.
WHOLE_COMPILED = "ours in torch.compile"
WHOLE_MODEL_ROWS = (Row("model", "step", 10), Row("model", "step", 200))


def model_rows(
    batches: Iterable[int],
    *,
    models: Iterable[str] = tuple(MODELS),
    modes: Iterable[int] = (2, 13),
    times: Iterable[str] = TIMES,
    phases: Iterable[str] = ("forward", "step"),
    precisions: Iterable[str] = ("fp32",),
) -> Iterator[Row]:
    for model, m, t, precision, batch, phase in product(
        models, modes, times, precisions, batches, phases
    ):
        yield Row("model", phase, batch, m, model, t, precision)


CPU_BATCHES = (1, 10, 50, 100, 200)


def cpu_rows() -> list[Row]:
    """The committed CPU table; the most telling rows first, so that a time limit cuts the least
    of it.
    """
    few, many = (
        sorted(
            model_rows(CPU_BATCHES, modes=(modes,)),
            key=lambda row: (row.phase != "step", row.times != "irregular", row.model, row.batch),
        )
        for modes in (2, 13)
    )
    # 400: minutes of U0, for the law it follows
    propagation = [Row("propagation", "backward", batch) for batch in (50, 100, 200, 10, 25, 400)]
    return propagation + few + cpu_op_rows() + cpu_large_rows() + many


def cpu_op_rows() -> list[Row]:
    pieces = [Row(op, "backward", 50, model=model) for op in ("encoder", "decoder", "graph_layer")
              for model in MODELS]  # fmt: skip
    transforms = [Row(op, "backward", 50, m) for op in ("graph_fourier", "inverse_graph_fourier")
                  for m in (2, 13)]  # fmt: skip
    eigh = [("random 13", 512), ("random 33", 512)]
    eigh += [(f"random {n}", 4096) for n in (2, 3, 4, 5, 6, 13, 21, 32, 48, 64)]
    # 42: the work of 4096 matrices of 13 rows; 1: as a single molecule is solved
    eigh += [(f"random {n}", batch) for n in (96, 128) for batch in (512, 42, 1)]
    spectra = [Row("eigh", "forward", batch, molecule=name) for name, batch in eigh]
    spectra += [replace(row, precision="fp64") for row in spectra[2:]]
    spectra.append(Row("spectrum", "forward", 4096))
    return [Row("solve", "backward", 50), *transforms, *pieces, *spectra]


def cpu_large_rows() -> list[Row]:
    """Whether time and memory stay linear in the batch, and the compiled solver loop beside the
    same loop as it stands.
    """
    propagation = [Row("propagation", "backward", batch) for batch in (1600, 6400)]
    attention = Row("solve", "backward", 50, model="sage_attention_concat")
    solves = [Row("solve", "backward", 200, model=model) for model in MODELS]
    return [*propagation, Row("model", "step", 800), attention, *solves]


def gpu_core_rows() -> list[Row]:
    """The target table, most important first."""
    step = [
        Row("model", "step", 50),
        Row("model", "step", 4096),
        Row("model", "step", 4096, precision="tf32"),
    ]
    ode = [Row(op, "backward", 4096) for op in ("propagation", "solve")]
    transforms = [Row(op, "forward", 4096) for op in ("graph_fourier", "inverse_graph_fourier")]
    spectra = [Row("eigh", "forward", 4096, molecule=f"random {n}") for n in (13, 33, 64)]
    reduced = [
        Row("model", "step", 50, precision="tf32"),
        Row("model", "step", 4096, precision="bf16"),
        Row("model", "step", 50, precision="bf16"),
        Row("model", "forward", 4096),
        Row("model", "forward", 4096, precision="bf16"),
    ]
    inference = Row("model", "forward", 4096, precision="tf32")
    return [*step, inference, *ode, *transforms, *spectra, *reduced]


def gpu_matrix_rows() -> list[Row]:
    """The combinations beside the target table, most important first."""
    others = [
        Row("model", "step", batch, m, model, times, precision)
        for times in ("irregular", "regular")
        for batch in (4096, 50)
        for precision in ("tf32", "fp32")
        for model, m in (("sage_attention_concat", 2), ("egnn", 13), ("sage_attention_concat", 13))
    ]
    regular = [Row("model", "step", batch, times="regular") for batch in (4096, 512, 50)]
    sizes = [Row("model", "step", batch) for batch in (1, 512, 16384)]
    layers = [
        Row(op, "backward", 4096, model=model, precision=precision)
        for op in ("graph_layer", "decoder", "encoder")
        for model in MODELS
        for precision in ("fp32", "tf32")
    ]
    forms = [Row("graph_layer", "forward", batch, molecule=molecule, model=model)
             for molecule in ("aspirin", "peptide 148", "peptide 370")
             for model in MODELS
             for batch in (16, 50)]  # fmt: skip
    first = 6  # irregular times, B = 4096
    return [
        *sizes,
        *others[:first],
        *regular,
        *layers,
        *forms,
        Row("graph_layer", "forward", 4096),
        *others[first:],
        Row("solve", "backward", 512),
    ]


def _and_tiny(rows: Iterable[Row]) -> frozenset[Row]:
    """With what a dry run makes of them."""
    rows = list(rows)
    return frozenset([*rows, *(row.tiny() for row in rows)])


# On a GPU a step of U0 at B = 4096 takes ten seconds, and compiling C1 or the solver's loop a
# minute or more, so each runs only where a target is a ratio to it.
_LOOPS = _and_tiny([Row("solve", "backward", 512)])
GPU_ROWS_OF: dict[str, frozenset[Row]] = {
    "U0": _and_tiny(
        [*gpu_core_rows()[:5], Row("model", "step", 1), Row("model", "step", 512)],
    ),
    "C1": _and_tiny(
        [*gpu_core_rows()[:4], *gpu_matrix_rows()[3:6], Row("model", "step", 4096, times="regular")]
    ),
    TWO_THREADS: frozenset(),
    SUMS_KEPT: _and_tiny([Row("model", "step", 4096, precision=p) for p in ("fp32", "tf32")]),
    EAGER_LOOP: _LOOPS,
    "ours compiled": _LOOPS,
}


# Whose operations are not counted. Graphs of torch.compile dispatch none, and up to torch 2.13 code
# called once inside the mode that counts is never compiled again; the loop of the eager loop is an
# operator without a rule for that mode.
UNCOUNTED = ("C1", WHOLE_COMPILED, "ours compiled", EAGER_LOOP)


SETS = {
    "cpu": cpu_rows,
    "gpu-core": gpu_core_rows,
    "gpu-matrix": gpu_matrix_rows,
}


def select(rows: Iterable[Row], patterns: Iterable[str]) -> list[Row]:
    """Rows whose name matches any shell pattern, `*` around each understood.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    rows, chosen = list(rows), []
    for pattern in patterns:
        hits = [row for row in rows if fnmatch.fnmatch(row.name, f"*{pattern}*")]
        if not hits:
            raise ValueError(
                f"select: `rows` must match a row, got {pattern!r}; try one of "
                + "; ".join(row.name for row in rows[:5])
            )
        chosen += [row for row in hits if row not in chosen]
    return chosen
