"""Builds gfnode_fast._C as GFNODE_BUILD says; everything else is in pyproject.toml.

GFNODE_BUILD=auto   (default) the extension if torch and a C++ compiler are there, with its CUDA
                    part if CUDA_HOME is set and torch is a CUDA build; else a pure-Python package
GFNODE_BUILD=none   no extension
GFNODE_BUILD=cpu    the extension without CUDA, or an error
GFNODE_BUILD=cuda   the extension with CUDA, or an error; needs nvcc, but neither a GPU nor a
                    CUDA build of torch

What was built, and why no more, is written to gfnode_fast/_build.json, where `gfnode_fast.info()`
finds it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
TORCH_TARGET = "0x020b000000000000"  # the ABI of torch 2.11; the binary serves all later ones
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


class Unavailable(Exception):
    """A part of the extension cannot be built here; the message says why."""


@dataclass
class Plan:
    requested: str
    extension: str | None  # None, "cpu" or "cuda"
    reason: str | None  # why nothing more than that
    cuda_home: str | None = None


def say(message):
    print(f"gfnode_fast: {message}", file=sys.stderr)


def require_torch():
    try:
        import torch
    except ImportError as error:
        raise Unavailable(
            f"torch cannot be imported at build time ({error}); install torch first, then this"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise Unavailable(f"torch must be 2.11 or later at build time, got {torch.__version__}")
    return torch


def require_compiler():
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    found = [command for command in candidates if shutil.which(shlex.split(command)[0])]
    if not found:
        raise Unavailable(f"no C++ compiler ({', '.join(candidates)} not found); install g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise Unavailable(
            f"no Python.h in {sysconfig.get_path('include')}; install Python's headers"
        )
    os.environ["CXX"] = found[0]  # compiling and linking both follow it


def require_nvcc(torch):
    home = os.environ.get("CUDA_HOME")
    if not home:
        raise Unavailable("CUDA_HOME is not set; set it to the CUDA toolkit's folder")
    nvcc = Path(home, "bin", "nvcc")
    if not nvcc.is_file():
        raise Unavailable(f"CUDA_HOME={home} has no bin/nvcc")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)", text)
    if torch.version.cuda and release and release[1] != torch.version.cuda.split(".")[0]:
        raise Unavailable(f"nvcc is of CUDA {release[1]}, torch of CUDA {torch.version.cuda}")
    return home


def make_plan():
    mode = os.environ.get("GFNODE_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"gfnode_fast: GFNODE_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return Plan(mode, None, "GFNODE_BUILD=none was set when it was installed")
    try:
        torch = require_torch()
        require_compiler()
    except Unavailable as problem:
        if mode != "auto":
            sys.exit(f"gfnode_fast: GFNODE_BUILD={mode} cannot be served: {problem}")
        return Plan(mode, None, str(problem))
    if mode == "cpu":
        return Plan(mode, "cpu", "GFNODE_BUILD=cpu was set when it was installed")
    try:
        if mode == "auto" and not torch.version.cuda:
            raise Unavailable("torch is not a CUDA build")
        return Plan(mode, "cuda", None, cuda_home=require_nvcc(torch))
    except Unavailable as problem:
        if mode != "auto":
            sys.exit(f"gfnode_fast: GFNODE_BUILD={mode} cannot be served: {problem}")
        return Plan(mode, "cpu", str(problem))


def sources(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def extension(plan):
    from torch.utils import cpp_extension

    version = re.search(
        r'__version__ = "(.+)"', (ROOT / "gfnode_fast" / "_version.py").read_text()
    )[1]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DGFNODE_VERSION={version}"]
    files = sources("*.cpp") + sources("ops/*.cpp") + sources("cpu/*.cpp")
    link = []
    if plan.extension == "cuda":
        # A CPU build of torch leaves its own CUDA_HOME unset; the CUDA files need no torch header.
        cpp_extension.CUDA_HOME = plan.cuda_home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        defines.append("-DGFNODE_WITH_CUDA")
        files += sources("cuda/*.cu")
        link = [f"-L{plan.cuda_home}/{folder}" for folder in ("lib64", "lib")]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension(
        "gfnode_fast._C",
        files,
        py_limited_api=True,
        extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden", *defines], "nvcc": ["-O3"]},
        extra_link_args=link,
    )


def build_ext_command():
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    class BuildExt(BuildExtension):
        def run(self):
            try:
                super().run()
            except BaseException:
                say("the extension did not build; GFNODE_BUILD=none installs without it")
                raise

    if not is_ninja_available():
        say("ninja is missing: compiling one file after another, and all of them every time")
    return BuildExt.with_options(no_python_abi_suffix=True, use_ninja=is_ninja_available())


class BuildPy(build_py):
    """Adds the record of what was built."""

    def run(self):
        super().run()
        package = Path(ROOT if self.editable_mode else self.build_lib, "gfnode_fast")
        if PLAN.extension is None:
            for stale in package.glob("_C*.so"):  # of an earlier build into the same folder
                stale.unlink()
        record = {key: value for key, value in asdict(PLAN).items() if key != "cuda_home"}
        (package / "_build.json").write_text(json.dumps(record) + "\n")


# An environment's own ninja is not on PATH when its Python is called without activating it.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])

PLAN = make_plan()
if PLAN.extension is None:
    say(f"pure-Python package, without the compiled extension: {PLAN.reason}")
    setup(cmdclass={"build_py": BuildPy})
else:
    say(f"with the compiled extension ({PLAN.extension})")
    setup(
        ext_modules=[extension(PLAN)],
        cmdclass={"build_py": BuildPy, "build_ext": build_ext_command()},
        # Always relink: setuptools compares dates, not options. ninja keeps what is still valid.
        options={"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"force": True}},
    )
