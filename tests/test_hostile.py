"""Nothing that genesis opens is executed, and nothing leads out of its folder."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from blobs import blobs

from genesis.cli import main
from genesis.config import load_config
from genesis.data.scans import Quarantine, read_scan
from genesis.engine.checkpoint import read_checkpoint
from genesis.errors import UserError
from genesis.files import read_json, sha256, verify_folder
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


HUGE = "9" * 4000
HOSTILE = (
    ("seed", "[]"), ("seed", HUGE), ("seed", "1e999"), ("spacing_mm", "[1e-300, 1, 1]"), ("spacing_mm", "[NaN, 1, 1]"),
    ("spacing_mm", '"../.."'), ("spacing_mm", "[]"), ("in_channels", "0"), ("in_channels", "1000000000"),
    ("in_channels", "-1"), ("modality", '"/etc/passwd"'), ("dim", '"4d"'), ("dim", "null"), ("schema", '"1"'),
)  # fmt: skip
OF_RUNS = (
    ("method", "7"),
    ("kind", '"../run"'),
    ("status", "{}"),
    ("trained", '["../a"]'),
    ("cohort", '{"patients": 1}'),
)
OF_DISCOVERY = (("data", "[]"), ("data", "{}"), ("discovery", '{"__class__": 1}'), ("pseudo_labels_sha256", "{}"))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return shutil.copytree(Path(__file__).parent / "version_1", tmp_path / "workspace")


def changed(file: Path, field: str, value: str) -> None:
    record = read_json(file)
    record[field] = "PLACE"
    text = json.dumps(record, indent=1).replace('"PLACE"', value)
    file.write_text(text, encoding="utf-8")
    sums = file.with_name("SHA256SUMS")
    if sums.exists():
        lines = [line for line in sums.read_text(encoding="utf-8").splitlines() if not line.endswith(file.name)]
        sums.write_text("\n".join([*lines, f"{sha256(file)}  {file.name}"]) + "\n", encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("field", "value"), HOSTILE + OF_RUNS)
def test_hostile_values_in_a_run_are_one_sentence(
    field: str, value: str, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(recorded / "runs" / "run" / "run.json", field, value)
    refused(capsys, "export", "--run", "run", "--workspace", str(recorded))
    refused(capsys, "train", "--resume", "--run", "run", "--workspace", str(recorded))


@pytest.mark.parametrize(("field", "value"), HOSTILE + OF_DISCOVERY)
def test_hostile_values_in_a_discovery_are_one_sentence(
    field: str, value: str, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(recorded / "discovery" / "3d" / "discovery.json", field, value)
    refused(capsys, "train", "--workspace", str(recorded))


@pytest.mark.parametrize("text", ["[]", "7", "null", '"x"', "{}", "[" * 100_000])
def test_records_that_are_none_are_one_sentence(text: str, recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recorded / "runs" / "run" / "run.json").write_text(text, encoding="utf-8")
    refused(capsys, "export", "--run", "run", "--workspace", str(recorded))
