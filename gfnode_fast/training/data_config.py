"""What a run learns from: one trajectory, or several for one model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any, Literal

from gfnode_fast.data.readers import Format
from gfnode_fast.training.config_checks import choice, must, positive, positive_int

SAMPLE_PREFIX = "sample:"
DEFAULT_TRAJECTORY = SAMPLE_PREFIX + "aspirin"

# What all molecules of a run have in common, since one model answers for them.
SHARED = {"num_timesteps", "delta_frame", "sampling", "sampling_temperature"}


@dataclass(frozen=True)
class DataConfig:
    """The trajectory, or several, and the windows drawn from it.

    Attributes:
        trajectory: a file that ``gfnode_fast.data.load_trajectory`` reads, or ``sample:aspirin``
            / ``sample:ethanol`` for the shipped GFN2-xTB runs.
        dt_fs: time between frames in fs when the file does not say.
        topology: topology file for DCD/XTC/H5 trajectories.
        format: reader to use when the file name does not tell.
        heavy_only: drop hydrogens (as published for MD17; keep them for MD22).
        bonds: ``covalent`` radii, or the ``published`` 1.6 A rule.
        rigid_bonds: pairs of atom indices marked ``stick`` in the edge features, or the name of
            one of the published lists (``aspirin``, ``ethanol`` ...).
        num_timesteps: T, output times of one window.
        delta_frame: the longest horizon, frames.
        sampling: ``irregular`` (T distinct times drawn per window) or ``regular``.
        split: ``blocks`` (contiguous time blocks with gaps, no leak) or ``published`` (random).
        train_size, val_size, test_size: windows in each part; null: every start there is.
        fractions: lengths of the three blocks, in proportion.
        seed: seed of the windows.
        split_file: windows written by ``gfnode_fast.data.save_windows`` (every run writes its own
            to ``windows.json``), used in place of drawing them.
        molecules: several trajectories, of different molecules or not, for one model: each a file
            or sample, or a mapping of ``trajectory`` and of options that differ from the ones
            above for this molecule alone, and a ``name``. In place of ``trajectory``.
        sampling_temperature: tau: of the n_k training windows of molecule k a share proportional
            to n_k^(1/tau) is drawn in each epoch (`gfnode_fast.training.order`). 1: every window
            once; null: as many of each molecule.
    """

    trajectory: str = DEFAULT_TRAJECTORY
    dt_fs: float | None = None
    topology: str | None = None
    format: Format | None = None
    heavy_only: bool = True
    bonds: Literal["covalent", "published"] = "covalent"
    rigid_bonds: list[tuple[int, int]] | str = field(default_factory=list)
    num_timesteps: int = 8
    delta_frame: int = 3000
    sampling: Literal["irregular", "regular"] = "irregular"
    split: Literal["blocks", "published"] = "blocks"
    train_size: int | None = 500
    val_size: int | None = 2000
    test_size: int | None = 2000
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    seed: int = 0
    split_file: str | None = None
    molecules: list[str | dict[str, Any]] = field(default_factory=list)
    sampling_temperature: float | None = 1.0

    def __post_init__(self) -> None:
        ok = isinstance(self.trajectory, str) and self.trajectory != ""
        must(ok, "data.trajectory", "a file or sample:NAME", self.trajectory, "name one")
        if self.dt_fs is not None:
            positive("data.dt_fs", self.dt_fs)
        if not self.is_mixed and self.trajectory.startswith(SAMPLE_PREFIX):
            for name in ("dt_fs", "topology", "format"):
                value = getattr(self, name)
                must(value is None, f"data.{name}", "null for a sample", value, "leave it out")
            must(
                self.heavy_only,
                "data.heavy_only",
                "true for a sample, which has no hydrogens",
                self.heavy_only,
                "leave it out, or make a trajectory with gfnode-fast data simulate",
            )
        choice("data.bonds", self.bonds, ("covalent", "published"))
        choice("data.sampling", self.sampling, ("irregular", "regular"))
        choice("data.split", self.split, ("blocks", "published"))
        for name in ("num_timesteps", "delta_frame", "train_size", "val_size", "test_size"):
            if getattr(self, name) is not None or not name.endswith("_size"):
                positive_int(f"data.{name}", getattr(self, name))
        must(
            len(self.fractions) == 3,
            "data.fractions",
            "three numbers",
            self.fractions,
            "give those of train, val and test",
        )
        for fraction in self.fractions:
            positive("data.fractions", fraction)
        object.__setattr__(self, "fractions", tuple(self.fractions))
        positive_int("data.seed", self.seed, minimum=0)
        must(
            self.delta_frame >= self.num_timesteps,
            "data.delta_frame",
            f">= data.num_timesteps ({self.num_timesteps})",
            self.delta_frame,
            "T distinct times need at least T frames",
        )
        if not isinstance(self.rigid_bonds, str):
            pairs = [tuple(pair) for pair in self.rigid_bonds]
            good = all(len(p) == 2 and all(isinstance(i, int) and i >= 0 for i in p) for p in pairs)
            must(
                good,
                "data.rigid_bonds",
                "pairs of atom indices",
                self.rigid_bonds,
                "write [[0, 1], [2, 3]]",
            )
            object.__setattr__(self, "rigid_bonds", pairs)
        self._check_molecules()

    def _check_molecules(self) -> None:
        temperature = self.sampling_temperature
        if temperature is not None:
            positive("data.sampling_temperature", temperature)
        must(
            self.is_mixed or temperature == 1,
            "data.sampling_temperature",
            "1 with one trajectory",
            temperature,
            "leave it out, or name data.molecules",
        )
        if not self.is_mixed:
            return
        must(
            self.trajectory == DEFAULT_TRAJECTORY,
            "data.trajectory",
            "left out beside data.molecules",
            self.trajectory,
            "make it one of the molecules",
        )
        own = {"name", *(option.name for option in fields(self))} - SHARED - {"molecules"}
        entries = [{"trajectory": m} if isinstance(m, str) else m for m in self.molecules]
        for k, entry in enumerate(entries):
            unknown = sorted(set(entry) - own) if isinstance(entry, dict) else []
            must(
                isinstance(entry, dict)
                and not unknown
                and isinstance(entry.get("trajectory"), str)
                and entry["trajectory"] != "",
                f"data.molecules[{k}]",
                f"a trajectory, or `trajectory` with any of {', '.join(sorted(own))}",
                entry,
                f"remove {unknown[0]}" if unknown else "name a trajectory",
            )
        object.__setattr__(self, "molecules", [_plain(entry) for entry in entries])
        self.by_molecule()  # each checks itself

    @property
    def is_mixed(self) -> bool:
        """Whether one model is trained on several trajectories."""
        return len(self.molecules) > 0

    def by_molecule(self) -> dict[str, DataConfig]:
        """The configuration of each trajectory alone, by name: as given, else the file's stem."""
        if not self.is_mixed:
            return {_stem(self.trajectory): self}
        found: dict[str, DataConfig] = {}
        for k, entry in enumerate(self.molecules):
            assert isinstance(entry, dict)
            options = dict(entry)
            name = options.pop("name", None) or _stem(options["trajectory"])
            valid = isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name) and name not in found
            must(
                bool(valid) and not name.isdecimal(),
                f"data.molecules[{k}].name",
                "letters, digits and _.+-, not a number and not that of another",
                name,
                "give the molecule a name of its own",
            )
            found[name] = replace(self, molecules=[], sampling_temperature=1.0, **options)
        return found


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, list | tuple) else value


def _stem(trajectory: str) -> str:
    return re.sub(r"[^\w.+-]", "_", PurePath(trajectory.removeprefix(SAMPLE_PREFIX)).stem)
