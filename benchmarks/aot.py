"""Compile every registered Triton kernel, and every .cu file, for GPUs that are not here.

    python benchmarks/aot.py [--json OUT] [--arch 80 90 100]

prints registers, spills, shared memory and instruction mix. The exit status is 1 when a kernel
spills or takes more shared memory than its target has, unless its case says why it may, when an
entry kernel has no case, or when something does not compile. Needs TRITON_INTERPRET unset: a
kernel decorated under the interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gfnode_fast.kernels.registry import AotCase, all_cases, missing_cases

ROOT = Path(__file__).resolve().parents[1]

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # triton.compile refuses no excess
REPORTED = (
    "HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "DMMA", "FFMA", "DFMA", "MUFU", "LDG", "STG", "LDGSTS",
    "LDL", "STL", "RED", "REDG", "ATOMG",
)  # fmt: skip
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """What one case became on one architecture."""

    name: str
    arch: int
    registers: int
    stack: int
    local_accesses: int  # loads and stores of local memory: spills
    shared: int
    instructions: dict[str, int]
    seconds: float
    problem: str | None
    allowed: str | None


def compile_case(case: AotCase, arch: int) -> Compiled:
    """Compile one case and read its real cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    names = kernel.arg_names
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in case.divisible_by_16
    }
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=dict(case.constexprs), attrs=attributes
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    began = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - began
    registers, stack, mix = _read_cubin(compiled.asm["cubin"])
    local, shared = mix["LDL"] + mix["STL"], compiled.metadata.shared
    problem = None
    if shared > SHARED_LIMIT[arch]:
        problem = f"{shared} bytes of shared memory, the target has {SHARED_LIMIT[arch]}"
    elif local or stack:
        problem = f"spills: {local} local accesses, {stack} bytes of stack"
    return Compiled(
        case.name,
        arch,
        registers,
        stack,
        local,
        shared,
        {op: mix[op] for op in REPORTED if mix[op]},
        round(seconds, 2),
        problem,
        case.allowed_spills_reason if local or stack else None,
    )


def _read_cubin(cubin: bytes) -> tuple[int, int, collections.Counter[str]]:
    """Registers, stack bytes and instruction counts; kept beside Triton's cache of the cubin."""
    import triton

    cache = Path(triton.knobs.cache.dir) / "gfnode_aot"
    known = cache / f"{hashlib.sha256(cubin).hexdigest()}.json"
    if known.exists():
        registers, stack, mix = json.loads(known.read_text())
        return registers, stack, collections.Counter(mix)
    found = _disassemble(cubin)
    cache.mkdir(parents=True, exist_ok=True)
    partial = known.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    partial.write_text(json.dumps(found))
    partial.replace(known)
    return found


def _disassemble(cubin: bytes) -> tuple[int, int, collections.Counter[str]]:
    """The same, with the tools that Triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ.get('PATH', '')}"}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [tools / "cuobjdump", "-res-usage", "-sass", path],
            capture_output=True,
            text=True,
            check=True,
            env=environment,  # cuobjdump looks for nvdisasm there
        )
    text = done.stdout + done.stderr
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"aot: cuobjdump reports no registers or stack: {text[:200]!r}")
    mix = collections.Counter(INSTRUCTION.findall(text))
    return int(registers[1]), int(stack[1]), mix


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> list[Compiled]:
    """Every registered case on its architectures; what fails to compile is a problem in its
    row.
    """

    def attempt(job: tuple[AotCase, int]) -> Compiled:
        case, arch = job
        try:
            return compile_case(case, arch)
        except Exception as error:
            text = f"does not compile: {type(error).__name__}: {str(error)[:500]}"
            return Compiled(case.name, arch, 0, 0, 0, 0, {}, 0.0, text, None)

    jobs = [
        (case, arch) for case in all_cases() for arch in architectures if case.only in (None, arch)
    ]
    # ptxas and cuobjdump are processes of their own, most of the time: threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(attempt, jobs))


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc").rglob("*.cu"))


def compile_cuda_source(
    path: Path, nvcc: str, architectures: tuple[int, ...] = ARCHITECTURES
) -> list[Compiled]:
    """One .cu file through nvcc; one entry per kernel and architecture, or per file without
    kernels.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", *targets, "-I", ROOT / "csrc", "-c", path,
             "-o", Path(folder) / "out.o"],
            capture_output=True,
            text=True,
        )  # fmt: skip
    seconds, name = round(time.perf_counter() - began, 2), path.relative_to(ROOT).as_posix()
    if done.returncode:
        text = f"does not compile: {done.stderr.strip()[:500]}"
        return [Compiled(name, 0, 0, 0, 0, 0, {}, seconds, text, None)]
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = []
    for match in pattern.finditer(done.stderr):
        spilled = int(match["stores"]) + int(match["loads"])
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        problem = f"spills {spilled} bytes" if spilled else None
        found.append(
            Compiled(f"{name} {match['kernel']}", int(match["arch"]), int(match["registers"]),
                     int(match["stack"]), spilled, int(shared[1]) if shared else 0, {}, seconds,
                     problem, None)
        )  # fmt: skip
    return found or [Compiled(f"{name} (no kernels)", 0, 0, 0, 0, 0, {}, seconds, None, None)]


def table(compiled: list[Compiled]) -> str:
    lines = [
        "| kernel | sm | registers | local accesses | shared | instructions | s | verdict |",
        "|" + " --- |" * 8,
    ]
    for c in compiled:
        mix = " ".join(f"{op}:{n}" for op, n in c.instructions.items())
        verdict = "ok"
        if c.problem:
            verdict = f"{c.problem} (allowed: {c.allowed})" if c.allowed else c.problem
        lines.append(
            f"| {c.name} | {c.arch} | {c.registers} | {c.local_accesses} | {c.shared} | {mix} | "
            f"{c.seconds} | {verdict} |"
        )
    return "\n".join(lines)


def report(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, Any]:
    """Everything compiled, the kernels nobody registered, and why .cu files were left out, if
    so.
    """
    nvcc = shutil.which("nvcc")
    sources = cuda_sources()
    cuda = [c for p in sources for c in compile_cuda_source(p, nvcc, architectures)] if nvcc else []
    compiled = [*compile_all(architectures), *cuda]
    return {
        "compiled": [asdict(c) for c in compiled],
        "missing": missing_cases(),
        "cuda_sources": [p.relative_to(ROOT).as_posix() for p in sources],
        "cuda_skipped": None if nvcc or not sources else "nvcc is not on PATH",
        "table": table(compiled),
    }


def problems(found: dict[str, Any]) -> list[str]:
    bad = [
        f"{c['name']} sm_{c['arch']}: {c['problem']}"
        for c in found["compiled"]
        if c["problem"] and not c["allowed"]
    ]
    return bad + [f"{name}: no AotCase in its module" for name in found["missing"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    found = report(tuple(options.arch))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(found["table"])
    if found["cuda_skipped"]:
        print(f"not compiled: {', '.join(found['cuda_sources'])}: {found['cuda_skipped']}")
    bad = problems(found)
    for line in bad:
        print(f"problem: {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
