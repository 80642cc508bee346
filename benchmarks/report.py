"""Tables, figures and the README's performance section, from result files.

python benchmarks/report.py RESULT.json [--png FIGURE.png]     the table, and the figure
python benchmarks/report.py --readme README.md [--check]       the README's section, from all
                                                               committed results
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.formatting import SCHEMA, factor, heading, is_timed, seconds, size
from benchmarks.targets import missed_table
from benchmarks.training_tables import TABLES

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
EQUIVALENCE_FIGURE = "docs/images/equivalence.png"
COLUMNS = (
    "row", "contender", "median [quartiles]", "faster than U0", "than U1", "than C1", "peak memory",
    "operations", "error (outputs / gradients)", "notes",
)  # fmt: skip
README_ROWS = [
    f"model {phase} {model} M=2 B={batch} {times} fp32"
    for phase, model, times in (
        ("step", "egnn", "irregular"),
        ("step", "sage_attention_concat", "irregular"),
        ("step", "egnn", "regular"),
        ("forward", "egnn", "irregular"),
    )
    for batch in (1, 10, 50, 100, 200, 512, 4096, 16384)
] + [f"propagation backward egnn M=2 B={batch} irregular fp32" for batch in (50, 200, 4096)]


def load(path: Path) -> dict[str, Any]:
    """Read a result file of this folder's scripts.

    Raises:
        ValueError: it is none, or of another schema.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise ValueError(
            f"load: `path` must be a result of this version (schema {SCHEMA}), got {path} with "
            f"schema {result.get('schema')!r}; measure again"
        )
    return result


def cell(found: dict[str, Any]) -> str:
    """Median and quartiles, or why there are none."""
    if not is_timed(found):
        return f"{found['status']}: {found['reason']}"
    if found["n"] == 1:
        text = f"{seconds(found['median_s'])} (n = 1)"
    else:
        text = f"{seconds(found['median_s'])} [{seconds(found['q1_s'])}, {seconds(found['q3_s'])}]"
    return text if found["status"] == "ok" else f"{text} {found['status']}"


def _detail(name: str, found: dict[str, Any]) -> list[str]:
    operations = found.get("operations")
    memory = found.get("peak_bytes")
    error = found.get("agreement")
    return [
        name,
        cell(found),
        "" if memory is None else size(memory),
        "" if operations is None else f"{operations:,}",
        "" if error is None else f"{error['outputs']:.0e} / {error['gradients']:.0e}",
    ]


def _compilation(found: dict[str, Any]) -> str:
    if "compile_s" not in found:
        return ""
    without = found.get("cuda_graphs_failed")
    return (f"without CUDA graphs ({without}); " if without else "") + (
        f"compiled in {found['compile_s']:.0f} s, {found['graphs']} graphs, "
        f"{found['graph_breaks']} breaks, {found['recompiles']} recompiles"
    )


def _bandwidth(
    found: dict[str, Any], entry: dict[str, Any], ceilings: dict[str, Any] | None
) -> str:
    """Rate of the bytes that any implementation must move, where the row knows them."""
    least = entry.get("work", {}).get("min_bytes")
    if not least or not ceilings or not is_timed(found):
        return ""
    rate = least / found["median_s"]
    return f"{rate / 1e9:.3g} GB/s, {rate / ceilings['copy_bytes_per_s']:.0%} of a copy"


def table(result: dict[str, Any]) -> str:
    """All rows and contenders as markdown: time, ratios, memory, operations, agreement."""
    lines = [
        heading(result["about"], result["rows"]),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for entry in result["rows"]:
        title = entry["row"]["name"]
        for name, found in entry["contenders"].items():
            ratios = [
                factor(value) if (value := entry["ratios"].get(f"{name} / {base}")) else ""
                for base in ("U0", "U1", "C1")
            ]
            label, time, memory, operations, error = _detail(name, found)
            notes = found["reason"] if found["status"] == "invalid" else _compilation(found)
            notes = notes or _bandwidth(found, entry, result.get("ceilings"))
            cells = [title, label, time, *ratios, memory, operations, error, notes]
            lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
            title = ""
    return "\n".join(lines)


def accuracy_table(result: dict[str, Any]) -> str:
    """Error of every precision and solver mode beside its time, from a result of accuracy.py."""
    lines = [
        f"Errors against the reference in fp64 ({result['oracle_batch']} molecules), or where it "
        f"says so against its converged solution; times of {result['row']['name']}:",
        "",
        "| | precision | outputs | against fp32 | gradients | against fp32 | time |",
        "|" + " --- |" * 7,
    ]
    for entry in result["modes"]:
        converged = entry.get("oracle", "U0") != "U0"
        cells = [entry["contender"] + " (converged)" * converged, entry["precision"]]
        for kind in ("output", "grad"):
            cells.append(f"{entry[kind]:.1e}" if kind in entry else "")
            against = entry.get(f"{kind} against fp32")
            cells.append("" if against is None else f"{against:.2g}×")
        time = seconds(entry["median_s"]) if "median_s" in entry else ""
        cells.append(entry.get("reason", time))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme_section(results: list[dict[str, Any]]) -> str:
    """The README's tables: one per result file; of times, README_ROWS only."""
    parts = [
        "Medians of one run each; U0 is the published algorithm, U1 the same without the union "
        "of all molecules' times, C1 U1 under `torch.compile`. `benchmarks/results/` has "
        "quartiles, memory, agreement and every other row."
    ]
    for result in results:
        if "kind" in result:
            parts += ["", heading(result["about"]), "", TABLES[result["kind"]](result)]
            if result["kind"] == "equivalence" and result["about"]["device"] == "cpu":
                parts += ["", f"![Loss curves and their distances]({EQUIVALENCE_FIGURE})"]
            continue
        if "modes" in result:
            parts += ["", heading(result["about"]), "", accuracy_table(result)]
            continue
        rows = {entry["row"]["name"]: entry for entry in result["rows"]}
        chosen = [rows[name] for name in README_ROWS if name in rows]
        if not chosen:
            continue
        parts += ["", heading(result["about"], result["rows"]), ""]
        parts += [
            "| | U0 | U1 | C1 | ours | ours exact | ours against U0 | U1 | C1 |",
            "|" + " --- |" * 9,
        ]
        for entry in chosen:
            cells = [entry["row"]["name"]]
            for name in ("U0", "U1", "C1", "ours", "ours exact"):
                found = entry["contenders"].get(name, {"status": ""})
                if is_timed(found):
                    mark = {1: " (n = 1)"}.get(found["n"], "")
                    mark += " invalid" if found["status"] == "invalid" else ""
                    cells.append(seconds(found["median_s"]) + mark)
                else:
                    cells.append(found["status"])
            for base in ("U0", "U1", "C1"):
                value = entry["ratios"].get(f"ours / {base}")
                valid = entry["contenders"].get(base, {}).get("status") == "ok"
                cells.append(factor(value) if value and valid else "")
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts)


def committed_results() -> dict[str, dict[str, Any]]:
    """By file name."""
    return {path.name: load(path) for path in sorted(RESULTS.glob("*.json"))}


def replace_section(text: str, section: str) -> str:
    """`text` with `section` between the performance markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"replace_section: `text` must contain {BEGIN} and {END} once each, in this order; "
            "add the two lines where the table belongs"
        )
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="JSON files of run.py")
    parser.add_argument("--png", type=Path, help="draw the first result")
    parser.add_argument("--readme", type=Path, help="rewrite the section between the markers")
    parser.add_argument("--check", action="store_true", help="only compare; 1 when it differs")
    options = parser.parse_args(arguments)
    if options.check and not options.readme:
        parser.error("--check needs --readme")
    if options.png and not options.results:
        parser.error("--png needs a result file")
    results = [load(path) for path in options.results]
    for result in results:
        print(TABLES[result["kind"]](result) if "kind" in result else table(result))
    if options.png:
        from benchmarks.figure import draw  # matplotlib only where it is asked for

        draw(results[0], options.png)
    if options.readme:
        old = options.readme.read_text()
        committed = committed_results()
        parts = (readme_section(list(committed.values())), missed_table(committed))
        new = replace_section(old, "\n\n".join(parts))
        if options.check and new != old:
            print(f"{options.readme} differs from benchmarks/results/", file=sys.stderr)
            return 1
        if not options.check:
            options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
