"""Lets `pytest benchmarks` import the package of benchmarks, which is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that an installed gfnode_fast still wins.
sys.path.append(str(Path(__file__).resolve().parents[1]))
