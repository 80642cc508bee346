"""Import every module of the installed package and load its extension, without the extras."""

import importlib
import pkgutil
import sys

import gfnode_fast
from gfnode_fast._extension import why_no_extension


def fail(name: str) -> None:
    """Let `walk_packages` hide nothing."""
    raise ImportError(f"cannot walk into {name}") from sys.exc_info()[1]


names = [
    module.name
    for module in pkgutil.walk_packages(gfnode_fast.__path__, "gfnode_fast.", onerror=fail)
]
for name in names:
    importlib.import_module(name)
if problem := why_no_extension():
    sys.exit(f"gfnode_fast._C: {problem}")
sys.stdout.write(f"imported {len(names)} modules of {gfnode_fast.__path__[0]}\n")
