"""What the host does around a GPU, on a GPU that is not there (`fake_gpu`).

Real are devices, shapes and strides; the order of what runs, and what waits for the GPU. Kernels
are not run: their launchers are, up to the launch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # a process of its own for all of them, 45 s
TESTS = Path(__file__).parent
CASES = re.findall(r"^def (case_\w+)", (TESTS / "fake_gpu/cases.py").read_text(), re.MULTILINE)
DRIVER = """
import ctypes, json, sys
ctypes.CDLL(sys.argv[1])  # before torch, which asks once what devices there are
from fake_gpu.cases import run_all
json.dump(run_all(), open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    if torch.version.cuda is not None:
        pytest.skip("this torch has a CUDA of its own, in whose place none can be put")
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("g++ is not on PATH")
    folder, home = tmp_path_factory.mktemp("fake_gpu"), Path(torch.__file__).parent
    library, found = folder / "device.so", folder / "problems.json"
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}"]
    links = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
    source = TESTS / "fake_gpu/device.cpp"
    subprocess.run([compiler, *flags, source, "-o", library, *links], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", DRIVER, str(library), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found.read_text())


@pytest.mark.parametrize("case", CASES)
def test_device_placement(problems: dict[str, str | None], case: str) -> None:
    assert problems[case] is None, problems[case]
