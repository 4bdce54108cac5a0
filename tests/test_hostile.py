"""Nothing that genesis opens is executed, and nothing leads out of its folder."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from blobs import blobs

from genesis.config import load_config
from genesis.data.scans import Quarantine, read_scan
from genesis.engine.checkpoint import read_checkpoint
from genesis.errors import UserError
from genesis.files import verify_folder
from genesis.models import build_described
from genesis.weights.published import read_published


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickles_in_checkpoints_are_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "last.pt"
    torch.save({"schema": 1, "method": Touch(mark)}, path)
    with pytest.raises(UserError, match="plain numbers only"):
        read_published(path)
    content = bytearray(path.read_bytes())
    content[-2:] = (64).to_bytes(2, "little")  # with the right checksum, as anybody can compute it
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    with pytest.raises(UserError, match="more than tensors"):
        read_checkpoint(path)
    assert not mark.exists()


def test_tags_in_configs_are_not_run(tmp_path: Path) -> None:
    mark, tag = tmp_path / "mark", "!!python/object/apply:os.mkdir"
    (tmp_path / "config.yaml").write_text(f"spatial_dims: {tag} [{mark}]\n", encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(tmp_path / "config.yaml"))
    with pytest.raises(UserError, match="not a YAML value"):
        load_config("semantic_genesis_3d", [f"train.steps={tag} [{mark}]"])
    assert not mark.exists()


@pytest.mark.parametrize("name", ["os.mkdir", "builtins.eval", "monai.networks.nets.UNet.__init__", ""])
def test_cards_name_no_other_classes(name: str) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        build_described({"class": name, "kwargs": {"path": "mark"}})


def test_checksums_do_not_lead_out_of_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "link").symlink_to(tmp_path / "secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    for name in ("../secret", str(tmp_path / "secret"), "link"):
        (tmp_path / "package" / "SHA256SUMS").write_text(f"{digest}  {name}\n", encoding="utf-8")
        with pytest.raises(UserError, match="damaged or missing"):
            verify_folder(tmp_path / "package")


@pytest.mark.parametrize(("kind", "field"), [(".mhd", "ElementDataFile = "), (".nhdr", "data file: ")])
def test_headers_do_not_lead_out_of_their_folder(tmp_path: Path, kind: str, field: str) -> None:
    header = tmp_path / "scans" / f"scan{kind}"
    header.parent.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(blobs(0)[0]), header)
    (data,) = [path for path in header.parent.iterdir() if path != header]
    assert np.ptp(read_scan(header).array) > 0
    data.rename(tmp_path / data.name)
    text = header.read_text(encoding="utf-8")
    for elsewhere in (f"../{data.name}", str(tmp_path / data.name), f"x/../../{data.name}"):
        header.write_text(text.replace(field + data.name, field + elsewhere), encoding="utf-8")
        with pytest.raises(Quarantine, match="outside of its folder"):
            read_scan(header)
