"""The kernels run in Triton's interpreter: the same program, one element after the other, on the CPU.

Whether it interprets is decided when Triton is imported, so cases are computed in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from largescale.methods.sinkhorn import sinkhorn
from tests.helpers.codes import cosines, oracle
from tests.helpers.commands import ROOT

pytest.importorskip("triton", reason="no Triton on this machine")

PROGRAM = """
import sys, torch
from largescale.methods import sinkhorn, sinkhorn_kernels
sinkhorn_kernels._WARPS_A_PROCESSOR = 32  # eight programs of four warps, for two problems
calls = 0
def counted(*arguments, kernel=sinkhorn_kernels.codes):
    global calls
    calls += 1
    return kernel(*arguments)
sinkhorn_kernels.codes = counted
cases, results = torch.load(sys.argv[1], weights_only=True), []
for scores, options in cases:
    before = calls
    codes = sinkhorn.sinkhorn(scores, fused=True, **options)
    results.append((codes, scores, calls - before))
torch.save(results, sys.argv[2])
"""


def shaped(rows: int, prototypes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack([cosines(rows, prototypes, seed) for seed in range(2)]).to(dtype)


PRIOR = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
USUAL: dict[str, Any] = {"epsilon": 0.05, "iterations": 3, "check_range": False}
BY_KERNELS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "one row, one iteration": (shaped(1, 2), USUAL | {"iterations": 1}),
    "more rows than programs": (shaped(23, 7), USUAL),
    "many prototypes": (shaped(9, 300), USUAL),
    "a power of two, more iterations": (shaped(16, 16), USUAL | {"iterations": 5}),
    "bfloat16": (shaped(23, 7, torch.bfloat16), USUAL),
    "a single problem": (shaped(8, 6)[0], USUAL),
    "not contiguous": (shaped(6, 12).transpose(0, 1), USUAL),
    "a prior": (shaped(40, 5), USUAL | {"epsilon": 0.1, "prior": PRIOR}),
    "no rows": (shaped(3, 5)[:, :0], USUAL),
}
OTHERWISE = {
    "a small epsilon": (shaped(6, 5), USUAL | {"epsilon": 0.02}),
    "float64": (shaped(6, 5, torch.float64), USUAL),
    "scores that may be large": (shaped(6, 5), USUAL | {"check_range": True}),
}
CASES = BY_KERNELS | OTHERWISE


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Codes, the scores afterwards and how often the kernels were called, by case."""
    folder: Path = tmp_path_factory.mktemp("kernels")
    torch.save([(scores.clone(), options) for scores, options in CASES.values()], folder / "cases")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder / "cases"), str(folder / "results")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(folder / "results", weights_only=True), strict=True))


def test_without_triton_nothing_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "largescale.methods.sinkhorn_kernels", raising=False)
    scores = shaped(5, 4)
    assert torch.equal(sinkhorn(scores, fused=True, **USUAL), sinkhorn(scores, **USUAL))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_float64_oracle(results, case):
    scores, options = CASES[case]
    codes, afterwards, calls = results[case]
    assert calls == (case in BY_KERNELS)
    assert torch.equal(afterwards, scores)
    assert codes.dtype == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
    expected = oracle(scores, options["epsilon"], options["iterations"], options.get("prior"))
    torch.testing.assert_close(codes.double(), expected, rtol=0, atol=1e-5 if case in OTHERWISE else 1e-6)


@pytest.mark.parametrize("prototypes", [300, 3000, 2**14])
def test_kernels_compile_for_gpus_though_there_is_none(prototypes, tmp_path, monkeypatch):
    """The interpreter takes programs that the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from largescale.methods import sinkhorn_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = sinkhorn_kernels._shape(prototypes)
    block, numbers = options.pop("block"), {"num_rows": "i32", "num_columns": "i32", "over_epsilon": "fp32"}
    for kernel, written, fixed in [
        (sinkhorn_kernels._column_sums, "partial", {"scaled": False, "with_prior": False, "block": block}),
        (sinkhorn_kernels._column_sums, "partial", {"scaled": True, "with_prior": True, "block": block}),
        (sinkhorn_kernels._codes, "codes", {"with_prior": True, "block": block}),
    ]:
        names = {
            "scores": "*fp32",
            "sums": "*fp32",
            "prior": "*fp32",
            written: "*fp32",
            **numbers,
            **dict.fromkeys(fixed, "constexpr"),
        }
        source = ASTSource(fn=kernel, signature=names, constexprs=fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert "st.global" in compiled.asm["ptx"]
