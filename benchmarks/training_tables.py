"""Tables of results that are no rows of the registry: those of whole training runs."""

from __future__ import annotations

from typing import Any

from benchmarks.formatting import factor, seconds, size


def equivalence_table(result: dict[str, Any]) -> str:
    """Verdict and distances of every precision, from a result of equivalence.py."""
    about = result["size"]
    lines = [
        f"Training of {about['sample']}, {about['steps']} steps of {about['batch']} windows, "
        f"{about['seeds']} seeds; distances from the reference's loss curve in standard deviations "
        "over its seeds, the largest of all steps:",
        "",
        "| ours | same seed | means | relative | final errors | verdict |",
        "|" + " --- |" * 6,
    ]
    for name, found in result["variants"].items():
        cells = [
            name,
            f"{found['largest_distance']:.1e}",
            f"{found['largest_distance_of_means']:.1e}",
            f"{found['largest_relative_distance']:.1e}",
            f"{found['largest_final_distance']:.1e}",
            found["verdict"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def end_to_end_table(result: dict[str, Any]) -> str:
    """Samples per second of whole training steps, from a result of end_to_end.py."""
    lines = [
        "Samples per second of `gfnode-fast train`, data loading included, of the same model's "
        "step on a fixed batch, and of the published recipe (reference model, per-item loader):",
        "",
        "| | train | bare step | published | train against bare step | published |",
        "|" + " --- |" * 6,
    ]
    for entry in result["batches"]:
        found, ratios = entry["contenders"], entry["ratios"]
        label = f"B = {entry['batch']}"
        for suffix in ("", " Triton"):
            name = f"train{suffix}"
            if name not in found:
                continue
            bare = f"bare step{suffix}"
            against = ratios.get(f"{name} / published")
            cells = [
                label + suffix,
                _rate(found[name]),
                _rate(found[bare]),
                _rate(found["published"]),
                f"{ratios[f'{name} / {bare}']:.1%}",
                "" if against is None else factor(against),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(found: dict[str, Any]) -> str:
    if "samples_per_s" not in found:
        return f"{found['status']}: {found['reason']}"
    return f"{found['samples_per_s']:.3g}" + (" (n = 1)" if found["n"] == 1 else "")


def large_systems_table(result: dict[str, Any]) -> str:
    """Time and memory of a step against the size of the molecule, from large_systems.py."""
    lines = [
        f"Training steps of {result['batch']} windows against the size of the molecule:",
        "",
        "| | atoms | edges | step | per edge | peak memory | per edge | graph, once |",
        "|" + " --- |" * 8,
    ]
    for system in result["systems"]:
        edges = system["edges"]
        cells = [
            system["system"],
            str(system["num_atoms"]),
            str(edges),
            seconds(system["median_s"]),
            seconds(system["median_s"] / edges),
            size(system["peak_bytes"]),
            f"{system['peak_bytes'] / edges / 2**10:.3g} kB",
            seconds(system["graph_s"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    spreads = [
        f"{name} per edge, largest over smallest: "
        f"{factor(result[name]['per_edge_ratio'])}, exponent between the two largest "
        f"{result[name]['last_exponent']:.2f}"
        for name in ("time", "memory")
        if result[name]
    ]
    if spreads:
        lines += ["", "; ".join(spreads).capitalize() + "."]
    return "\n".join(lines)


def reliability_table(result: dict[str, Any]) -> str:
    """Kills and memory in a sentence each, from a result of reliability.py."""
    kills, memory = result["kills"], result["memory"]
    same = "ended bit-identical" if kills["passed"] else "ended DIFFERENT"
    flat = "flat" if memory["passed"] else "GROWING"
    return (
        f"Training of {kills['steps']} steps, killed (SIGKILL) at {kills['kills']} random moments, "
        f"{kills['killed_while_writing_a_checkpoint']} of them while a checkpoint was written, and "
        f"resumed each time, {same} to the run without kills. Resident memory over "
        f"{memory['steps']} steps: {flat}, {memory['growth_bytes'] / 2**20:.2f} MB more in the "
        f"second half than in the first, of {size(max(memory['resident_bytes'].values()))}."
    )


def mixed_table(result: dict[str, Any]) -> str:
    """Time and memory of a step on two molecules, from a result of mixed.py."""
    lines = [
        "Forward and backward of a batch of which half is aspirin (13 atoms), half ethanol (3):",
        "",
        "| | mixed | apart | padded | against apart | padded | memory: mixed | apart | padded |",
        "|" + " --- |" * 9,
    ]
    for entry in result["batches"]:
        found, faster = entry["contenders"].values(), entry["faster"]
        cells = [
            f"B = {entry['batch']}",
            *(seconds(one["median_s"]) for one in found),
            *(factor(faster[name]) for name in ("apart", "padded")),
            *(size(one["peak_bytes"]) for one in found),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {
    "equivalence": equivalence_table,
    "end_to_end": end_to_end_table,
    "large_systems": large_systems_table,
    "mixed": mixed_table,
    "reliability": reliability_table,
}
