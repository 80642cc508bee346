"""Tables of results that are no rows of the registry: equivalence, end to end, large systems."""

from __future__ import annotations

from typing import Any


def equivalence_table(result: dict[str, Any]) -> str:
    """Verdict and distances of every precision, from a result of equivalence.py."""
    size = result["size"]
    lines = [
        f"Training of {size['sample']}, {size['steps']} steps of {size['batch']} windows, "
        f"{size['seeds']} seeds; distances from the reference's loss curve in standard deviations "
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


TABLES = {"equivalence": equivalence_table}
