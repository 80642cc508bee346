"""What is built for which GFNODE_BUILD, and what ends up in the distributions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the tests run away from the source tree"
)


def build(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GFNODE_BUILD", "CUDA_HOME", "CXX")
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def plan(**environment: str) -> subprocess.CompletedProcess[str]:
    return build("setup.py", "--quiet", "--name", **environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GFNODE_BUILD": "gpu"}, "must be one of auto, none, cpu, cuda, got 'gpu'"),
        ({"GFNODE_BUILD": ""}, "must be one of auto, none, cpu, cuda, got ''"),
        ({"GFNODE_BUILD": "cpu", "CXX": "no-such-c++"}, "no C++ compiler (no-such-c++ not found)"),
        ({"GFNODE_BUILD": "cuda"}, "CUDA_HOME is not set"),
        ({"GFNODE_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere has no bin/nvcc"),
    ],
)
def test_what_cannot_be_served_is_refused(environment: dict[str, str], message: str) -> None:
    result = plan(**environment)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GFNODE_BUILD": "none"}, "pure-Python package, without the compiled extension"),
        ({"CXX": "no-such-c++"}, "pure-Python package, without the compiled extension: no C++"),
        ({"GFNODE_BUILD": "cpu"}, "with the compiled extension (cpu)"),
    ],
)
def test_what_is_built_is_said(environment: dict[str, str], message: str) -> None:
    result = plan(**environment)
    assert result.returncode == 0, result.stderr
    assert message in result.stderr


def test_missing_ninja_is_said(tmp_path: Path) -> None:
    (tmp_path / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ninja").chmod(0o755)
    result = plan(GFNODE_BUILD="cpu", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert "ninja is missing" in result.stderr


def test_backend_finds_torch_under_build_isolation(tmp_path: Path) -> None:
    """As pip does it: the target's interpreter, its site-packages taken off the path."""
    site_packages = Path(sysconfig.get_path("purelib"))
    (tmp_path / "setuptools").symlink_to(site_packages / "setuptools")
    code = (
        "import sys\n"
        f"sys.path = [p for p in sys.path if not p.startswith({str(site_packages)!r})]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"sys.path.insert(0, {str(ROOT / 'build_backend')!r})\n"
        "import gfnode_backend, torch\n"
        "assert callable(gfnode_backend.build_wheel) and callable(gfnode_backend.build_editable)\n"
    )
    result = build("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_console_script_is_declared() -> None:
    scripts = distribution("gfnode-fast").entry_points.select(group="console_scripts")
    assert {(script.name, script.value) for script in scripts} == {
        ("gfnode-fast", "gfnode_fast.cli.main:main")
    }


def test_locked_versions_are_exact_and_name_no_index() -> None:
    for line in (ROOT / "requirements" / "dev.txt").read_text().splitlines():
        assert line.startswith("#") or line.count("==") == 1, line
        assert "/" not in line, line


def package_files() -> set[str]:
    """What an installation must hold: modules, samples, verified GPUs, the type marker."""
    package = ROOT / "gfnode_fast"
    modules = {path for folder in (package, ROOT / "kernels") for path in folder.rglob("*.py")}
    modules |= {path for path in (package / "data" / "samples").rglob("*") if path.is_file()}
    names = {path.relative_to(ROOT).as_posix() for path in modules}
    names |= {"gfnode_fast/py.typed", "gfnode_fast/ops/verified_gpus.json"}
    return {f"gfnode_fast/{name}" if name.startswith("kernels/") else name for name in names}


@pytest.mark.slow
def test_sdist_and_wheel_are_complete(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "golden", "runs")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    out = tmp_path / "dist"
    result = build(
        "-m", "build", "--no-isolation", "--outdir", str(out), cwd=tree, GFNODE_BUILD="none"
    )
    assert result.returncode == 0, result.stdout + result.stderr

    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= shipped
    assert {"LICENSE", "README.md", "build_backend/gfnode_backend.py"} <= shipped

    (wheel,) = out.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
        record = json.loads(archive.read("gfnode_fast/_build.json"))
    assert installed == package_files() | {"gfnode_fast/_build.json"}
    assert record["requested"] == "none"
    assert record["extension"] is None


@pytest.mark.slow
@pytest.mark.skipif(
    "CUDA_HOME" not in os.environ, reason="the CUDA part needs nvcc; CUDA_HOME names its folder"
)
def test_cuda_part_builds_without_a_gpu(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "tests", "runs")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    build_command = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path))
    home = os.environ["CUDA_HOME"]
    result = build(*build_command, cwd=tree, GFNODE_BUILD="cuda", CUDA_HOME=home)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    code = (
        "import json, torch\n"
        "torch.ops.load_library('gfnode_fast/_C.so')\n"
        "info = json.loads(torch.ops.gfnode_fast.build_info())\n"
        "assert info['cuda'] and 900 in info['cuda_architectures'], info\n"
    )
    loaded = build("-c", code, cwd=tmp_path / "wheel")
    assert loaded.returncode == 0, loaded.stderr
