"""Published checkpoints load, with their quirks; nothing in them is executed."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet

from genesis import load_into, load_pretrained
from genesis.errors import UserError
from genesis.models import PublishedUNet


@pytest.fixture(scope="module")
def network() -> PublishedUNet:
    torch.manual_seed(0)
    return PublishedUNet()


def checkpoint(network: PublishedUNet, prefix: str) -> dict[str, Any]:
    state = {prefix + key: value for key, value in network.state_dict().items()}
    heads = {f"{prefix}{key}": torch.zeros(2)
             for key in ("projection_head.0.weight", "prototypes.weight", "clc_out.fc1.weight")}  # fmt: skip
    return {"epoch": 3, "loss": np.float64(0.5), "best": np.float32(1), "state_dict": state | heads}


@pytest.mark.parametrize("prefix", ["", "module.", "module.classficationNet."])
def test_it_loads(network: PublishedUNet, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "Genesis_Chest_CT.pt"
    torch.save(checkpoint(network, prefix), path)
    loaded = load_pretrained(path)
    assert isinstance(loaded, PublishedUNet)
    assert torch.equal(loaded.state_dict()["up_tr64.up_conv.weight"], network.state_dict()["up_tr64.up_conv.weight"])
    target = PublishedUNet(out_channels=3, sigmoid=False)
    report = load_into(target, path, quiet=True)
    assert report.share == 1
    assert report.output.startswith("left as it was")
    with pytest.raises(UserError, match=r"weights of a genesis\.models\.PublishedUNet, which do not fit a UNet"):
        load_into(UNet(3, 1, 1, (4, 8), (2,)), path)


def test_one_of_numpy_1_loads(network: PublishedUNet, tmp_path: Path) -> None:
    """NumPy 2 moved the function that rebuilds a scalar; files from before name the old place."""
    buffer = io.BytesIO()
    torch.save(checkpoint(network, ""), buffer)
    path = tmp_path / "old.pt"
    with zipfile.ZipFile(buffer) as new, zipfile.ZipFile(path, "w") as old:
        for name in new.namelist():
            data = new.read(name)
            assert not name.endswith("data.pkl") or b"numpy._core" in data
            old.writestr(name, data.replace(b"numpy._core", b"numpy.core") if name.endswith("data.pkl") else data)
    load_pretrained(path)


def test_one_that_holds_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, ("raise SystemExit",)

    torch.save({"state_dict": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt cannot be read as a published checkpoint"):
        load_pretrained(tmp_path / "bad.pt")


def test_one_of_another_network_is_refused(network: PublishedUNet, tmp_path: Path) -> None:
    torch.save({"state_dict": UNet(3, 1, 1, (4, 8), (2,)).state_dict()}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"not a checkpoint of the published 3D U-Net: it has model\.0"):
        load_pretrained(tmp_path / "other.pt")
    torch.save({"state_dict": dict(list(network.state_dict().items())[:-1])}, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"not a whole checkpoint .* out_tr\.final_conv\.bias is missing"):
        load_pretrained(tmp_path / "part.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint", encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.pt cannot be read"):
        load_pretrained(tmp_path / "text.pt")
