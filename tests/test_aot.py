"""Every Triton kernel and .cu file compiled for sm_80, sm_90 and sm_100, without a GPU.

In a process of its own: the tests run kernels in Triton's interpreter, where nothing can be
compiled. Triton caches what it compiled, so that a second run takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gfnode_fast.kernels.registry import AotCase

pytest.importorskip("triton", reason="triton is not installed on this platform")
ROOT = Path(__file__).parents[1]


def in_own_process(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    done = in_own_process(ROOT / "benchmarks" / "aot.py", "--json", path)
    assert path.exists(), done.stderr[-3000:]
    return json.loads(path.read_text())


def test_every_entry_kernel_has_a_case(report: dict) -> None:
    assert report["missing"] == []


def test_kernels_compile_without_spills(report: dict) -> None:
    bad = [c for c in report["compiled"] if c["problem"] and not c["allowed"]]
    assert not bad, "\n".join(f"{c['name']} sm_{c['arch']}: {c['problem']}" for c in bad)


def test_cuda_sources_are_compiled(report: dict) -> None:
    if not report["cuda_sources"]:
        pytest.skip("csrc/ holds no .cu file")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    assert report["cuda_skipped"] is None
    for source in report["cuda_sources"]:
        assert any(c["name"].startswith(source) for c in report["compiled"])


PROBE = """
    import triton, triton.language as tl
    from gfnode_fast.kernels.registry import AotCase

    @triton.jit
    def _scaled(x, factor):
        return x * factor

    @triton.jit
    def _scale_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, _scaled(tl.load(x_ptr + i, mask=i < n), 2.0), mask=i < n)

    @triton.jit
    def _spill_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        r = tl.arange(0, BLOCK)
        a = tl.load(x_ptr + r[:, None] * BLOCK + r[None, :])
        s = a
        for _ in range(n):
            s = tl.exp(s) * a + tl.sum(s, 0)[None, :]
        tl.store(out_ptr + r[:, None] * BLOCK + r[None, :], s)

    @triton.jit
    def _forgotten_kernel(x_ptr):
        tl.store(x_ptr, 0.0)

    def aot_cases():
        signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
        return [
            AotCase(_scale_kernel, "scale", signature, {"BLOCK": 256}),
            AotCase(_spill_kernel, "spill", signature, {"BLOCK": 128}, num_warps=2),
            AotCase(_spill_kernel, "spill allowed", signature, {"BLOCK": 128}, num_warps=2,
                    allowed_spills_reason="a probe that is meant to spill"),
        ]
"""
DRIVER = """
    import json, sys
    import probe_kernels
    from benchmarks import aot
    from gfnode_fast.kernels import registry
    compiled = [aot.compile_case(case, 90) for case in registry.all_cases(probe_kernels)]
    print(json.dumps({
        "problems": {c.name: bool(c.problem) for c in compiled},
        "allowed": {c.name: c.allowed for c in compiled},
        "registers": compiled[0].registers,
        "entries": sorted(registry.entry_kernels(probe_kernels)),
        "missing": registry.missing_cases(probe_kernels),
    }))
"""


def test_the_check_sees_spills_and_forgotten_kernels(tmp_path: Path) -> None:
    package = tmp_path / "probe_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scale.py").write_text(textwrap.dedent(PROBE))
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(DRIVER))
    done = in_own_process(driver)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["problems"] == {"scale": False, "spill": True, "spill allowed": True}
    assert found["allowed"]["spill allowed"] == "a probe that is meant to spill"
    assert found["registers"] > 0
    names = ("_forgotten_kernel", "_scale_kernel", "_spill_kernel")  # not _scaled: it is called
    assert found["entries"] == [f"probe_kernels.scale.{name}" for name in names]
    assert found["missing"] == ["probe_kernels.scale._forgotten_kernel"]


def _kernel(x_ptr, num_rows, BLOCK):
    """Stands for a kernel: only its parameters matter here."""


@pytest.mark.parametrize(
    ("signature", "constexprs", "message"),
    [
        ({"x_ptr": "*fp32"}, {"BLOCK": 16}, "without a type or value"),
        ({"x_ptr": "*fp32", "num_rows": "i32"}, {"x_ptr": 1, "BLOCK": 16}, "with both a type and"),
        ({"x_ptr": "*fp32", "num_rows": "i32", "m": "i32"}, {"BLOCK": 16}, "does not have"),
        ({"x_ptr": "*fp32"}, {"num_rows": 1, "BLOCK": 16}, "is told nothing of"),
    ],
)
def test_a_case_must_fit_its_kernel(signature: dict, constexprs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AotCase(_kernel, "probe", signature, constexprs).check()
