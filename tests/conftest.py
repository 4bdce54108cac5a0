"""Real data, and shape annotations that are checked."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from dask_processes import Dask
from jaxtyping import install_import_hook

# Before anything imports them: from here on their jaxtyping annotations are checked at every call.
install_import_hook(
    [
        "genesis.transforms",
        "genesis.models",
        "genesis.losses",
        "genesis.text",
        "genesis.discovery",
        "genesis.methods.supervised",
        "genesis.data.labelled",
        "genesis.data.patches",
        "genesis.data.resample",
        "genesis.data.resident",
        "genesis.data.samplers",
    ],
    "beartype.beartype",
)

# A patient's hashed id decides the split and the order: the same ones are held out whenever the suite runs.
os.environ["GENESIS_ID_KEY"] = "tests"
torch.set_num_threads(1)  # tensors are tiny: more threads wait for each other, the longer the busier the machine


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans: `GENESIS_SHARED_DATA`, else ../shared/data beside the repository, else skip."""
    repository = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("GENESIS_SHARED_DATA") or repository.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set GENESIS_SHARED_DATA")
    return folder


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Dask]:
    """A scheduler without workers."""
    pytest.importorskip("distributed")
    with ExitStack() as processes:
        yield Dask(tmp_path, processes)
