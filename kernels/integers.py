"""Integer arguments of kernels."""

BATCH_SIZES = (
    "attempt", "first_a", "first_copy", "first_g", "first_mean", "first_message", "first_row",
    "max_attempts", "num_copies", "num_edges", "num_entries", "num_items", "num_nodes",
    "num_partials", "num_rows", "num_tiles",
)  # fmt: skip
"""Names of those that follow the batch or count launches, for `do_not_specialize`, which passes
over the ones that a kernel lacks. Triton compiles a kernel anew where an integer is 1, a multiple
of 16 or neither. That gains nothing here, and with molecules of different size kernels would be
compiled all through training.
"""
