"""Metrics of a run: ``metrics.jsonl`` and ``metrics.csv``, and TensorBoard if asked.

One row is one reading: of the training losses (``kind`` ``train``) or of a validation
(``kind`` ``validation``). Rows that do not apply to a column leave it out (JSON) or empty (CSV).
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gfnode_fast.data.files import AppendedFile, atomic_write
from gfnode_fast.training.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

COLUMNS = ("kind", "step", "epoch", "seconds", "lr", "loss", "grad_norm", "val_mse", "val_mse_last")
OF_MOLECULE = "val_mse/"

Row = dict[str, Any]


class MetricsLog:
    """Appends rows to the two files.

    Args:
        directory: where the files are.
        keep_rows: on resume, the rows that the checkpoint knows of; later ones are dropped, since
            the steps that made them will be made again. Without a ``metrics.jsonl`` a warning is
            logged and the log begins anew.
        tensorboard: also write event files, to ``directory/tensorboard``.
        molecules: names of those that have errors of their own, in `molecule_columns`.

    Raises:
        CheckpointError: ``metrics.jsonl`` is damaged or has fewer rows than the checkpoint.
        RuntimeError: TensorBoard was asked for and is not installed.
        WriteError: no space or no permission; also from the methods.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_rows: int = 0,
        tensorboard: bool = False,
        molecules: Sequence[str] = (),
    ) -> None:
        self._columns = (*COLUMNS, *molecule_columns(molecules))
        self._events = _summary_writer(directory / "tensorboard") if tensorboard else None
        rows = _rows_to_keep(directory, keep_rows) if keep_rows else []
        self.num_rows = len(rows)
        json_path, csv_path = directory / "metrics.jsonl", directory / "metrics.csv"
        with atomic_write(json_path) as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        header = ",".join(self._columns) + "\n"
        with atomic_write(csv_path) as stream:
            stream.write((header + "".join(self._csv_line(row) for row in rows)).encode())
        self._json, self._csv = AppendedFile(json_path), AppendedFile(csv_path)

    def write(self, row: Row) -> None:
        """Append one row; its keys must be among the columns."""
        unknown = sorted(set(row) - set(self._columns))
        if unknown:
            raise ValueError(
                f"metrics: `row` must have keys among {', '.join(self._columns)}, got {unknown}; "
                "add the column"
            )
        self._json.write(json.dumps(row) + "\n")
        self._csv.write(self._csv_line(row))
        self.num_rows += 1
        if self._events is not None:
            for name, value in row.items():
                if name not in ("kind", "step", "epoch"):
                    self._events.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def synchronise(self) -> None:
        """Make the rows outlast a power cut, as the checkpoint that counts them will.

        ``metrics.csv`` is made anew from ``metrics.jsonl`` on resume.
        """
        self._json.synchronise()

    def close(self) -> None:
        """Close the files."""
        self._json.close()
        self._csv.close()
        if self._events is not None:
            self._events.close()

    def _csv_line(self, row: Row) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n").writerow(row)
        return buffer.getvalue()


def molecule_columns(names: Sequence[str]) -> list[str]:
    """The columns of the validation errors of each of several molecules."""
    return [OF_MOLECULE + name for name in names]


def read_metrics(directory: str | Path) -> list[Row]:
    """The rows of a run's ``metrics.jsonl``; a last line cut short by a crash is left out.

    Raises:
        CheckpointError: a line is damaged.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(
                f"metrics: `{path}` must have a JSON object a line, got {error} in line {number}; "
                "restore the file, or remove it to go on without the earlier rows"
            ) from error
    return rows


def _rows_to_keep(directory: Path, count: int) -> list[Row]:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        logger.warning("train: %s is missing; its %d rows are not in the new one", path, count)
        return []
    rows = read_metrics(directory)
    if len(rows) < count:
        raise CheckpointError(
            f"metrics: `{path}` must have the {count} rows that the checkpoint counts, got "
            f"{len(rows)}; restore the file, or remove it to go on without the earlier rows"
        )
    return rows[:count]


def _summary_writer(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            "train: `tensorboard` must be installed to write event files, got an ImportError; "
            "do pip install 'gfnode-fast[tensorboard]' or set tensorboard to false"
        ) from error
    return SummaryWriter(str(directory))
