"""What version 1 wrote stays readable, and what a newer one writes is refused."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from genesis import cli, load_pretrained
from genesis.data.store import Volume, VolumeStore, read_audit, write_volume
from genesis.engine.checkpoint import read_checkpoint, write_checkpoint
from genesis.files import read_json, sha256, write_json

RECORDED = Path(__file__).parent / "version_1"
VOXELS = "a5b7dfcf98b6660bdd38bc252584441d62be9c82fe453546946ab2e5344af160"  # hash of all of them


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENESIS_ID_KEY", "chaos")  # with which it was recorded
    return shutil.copytree(RECORDED, tmp_path / "workspace")


def verb(workspace: Path, *arguments: str) -> None:
    cli.main([arguments[0], "--workspace", str(workspace), "--device", "cpu", *arguments[1:]])


def test_the_store_is_read_voxel_for_voxel(workspace: Path) -> None:
    store, digest = VolumeStore(workspace / "store"), hashlib.sha256()
    for volume in store.ids:
        digest.update(store[volume].read().tobytes())
        labels = store[volume].labels()
        assert labels is not None
        digest.update(labels.tobytes())
    assert digest.hexdigest() == VOXELS
    assert len(read_audit(workspace / "store")["splits"]) == 3


def test_a_run_goes_on_and_is_exported(workspace: Path) -> None:
    """With the checkpoint, the store, the discovery and the run of version 1."""
    verb(workspace, "export", "--run", "run", "--name", "again")
    assert sha256(workspace / "weights" / "again" / "weights.safetensors") == sha256(
        workspace / "weights" / "run" / "weights.safetensors"
    )
    verb(workspace, "train", "--resume", "--run", "run", "--steps", "8")
    assert read_checkpoint(workspace / "runs" / "run" / "checkpoints" / "last.pt")["step"] == 8


def test_the_package_loads_and_computes_the_same(workspace: Path) -> None:
    network = load_pretrained(workspace / "weights" / "run")  # checks the card's fingerprint
    assert sum(parameter.numel() for parameter in network.parameters()) == 1492


@pytest.mark.parametrize("kind", ["volume", "audit", "checkpoint", "run", "discovery", "card"])
def test_a_newer_artefact_is_refused(kind: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--run", "run"]
    if kind == "volume":
        volume = Volume(next((workspace / "store" / "volumes").glob("*.b2nd")))
        write_volume(workspace / "store", volume.read(), replace(volume.meta, schema=2), volume.labels())
        command = ["train"]
    elif kind == "checkpoint":
        write_checkpoint(
            workspace / "runs" / "run" / "checkpoints" / "best.pt", {"schema": 2, "method": torch.zeros(1)}
        )
    elif kind == "discovery":
        folder = workspace / "discovery" / "3d"
        record = (folder / "discovery.json").read_text(encoding="utf-8").replace('"schema": 1', '"schema": 2')
        before = sha256(folder / "discovery.json")
        (folder / "discovery.json").write_text(record, encoding="utf-8")
        sums = (folder / "SHA256SUMS").read_text(encoding="utf-8")
        after = sums.replace(before, sha256(folder / "discovery.json"))
        (folder / "SHA256SUMS").write_text(after, encoding="utf-8")
        command = ["train"]
    else:
        names = {"audit": "store/audit.json", "run": "runs/run/run.json", "card": "weights/run/card.json"}
        file = workspace / names[kind]
        write_json(file, {**read_json(file), "schema": 2})
        command = {"audit": ["train"], "run": command, "card": ["finetune", "--weights", "run"]}[kind]
    with pytest.raises(SystemExit) as stop:
        verb(workspace, *command)
    assert stop.value.code == 2
    assert "written by a newer genesis (schema 2; this one reads up to 1)" in capsys.readouterr().err
