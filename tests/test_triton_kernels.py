"""The Triton kernels and their plain forms are equal, but for rounding where there is arithmetic."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from genesis import transforms
from genesis.transforms.fused import kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which PyTorch for CUDA brings")


@needs_triton
def test_interpreted_kernels_equal_the_plain_forms() -> None:
    script = Path(__file__).with_name("kernels_and_plain_forms.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


@needs_triton
@pytest.mark.gpu
def test_kernels_equal_the_plain_forms() -> None:
    from kernels_and_plain_forms import assert_corruption_equal, assert_equal

    assert_equal(torch.device("cuda", 0))
    assert_corruption_equal(torch.device("cuda", 0), 16)


@needs_triton
@pytest.mark.gpu
def test_kernels_serve_where_they_work() -> None:
    assert kernels(torch.device("cuda", 0)) is not None


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genesis.transforms.triton_kernels", None)  # as if its import failed
    monkeypatch.delattr(transforms, "triton_kernels", raising=False)
    assert kernels.__wrapped__(torch.device("cuda", 0)) is None
