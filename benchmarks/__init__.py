"""The measuring bench: rows, inputs, baselines, timing, reports. Run its scripts from the
checkout.
"""
