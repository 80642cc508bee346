"""PEP 517 backend: setuptools, with the target environment's torch importable under isolation.

pip and uv run the backend with the target environment's interpreter and only take its
site-packages off `sys.path`. They go back on at the end, so the isolated setuptools still wins.
"""

import sys
import sysconfig

for _name in ("purelib", "platlib"):
    if (_path := sysconfig.get_path(_name)) not in sys.path:
        sys.path.append(_path)

from setuptools.build_meta import *  # noqa: E402, F403 - the hooks of PEP 517 and PEP 660
