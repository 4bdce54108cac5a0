"""Scans as vectors: what they are, the table, the verb's refusals."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from blobs import blobs, write_store
from test_finetune import write_weights

import genesis
from genesis.cli import main
from genesis.data.patches import window
from genesis.errors import UserError
from genesis.evaluation.embedding import FrozenEncoder
from genesis.models import wrap
from genesis.weights import load_pretrained
from genesis.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    write_weights(tmp_path / "weights" / "tiny")
    return tmp_path


def embed(workspace: Path, *arguments: str) -> None:
    main(["embed", "--workspace", str(workspace), "--device", "cpu", *arguments])


def refused(workspace: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        embed(workspace, *arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "vectors.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_scans(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        nib.save(nib.Nifti1Image(blobs(number)[0], np.diag((2.0, 2.0, 3.0, 1.0))), folder / f"scan{number}.nii.gz")
    return folder


def test_a_vector_is_the_mean_of_the_pooled_bottleneck_over_the_patches(workspace: Path) -> None:
    store = write_store(workspace / "store")
    package = workspace / "weights" / "tiny"
    volume = store["v00"]
    whole = window(volume.read(), volume.meta, (-1000.0, 1000.0))
    network = wrap(load_pretrained(package))
    vectors = [
        network.encode(whole[None, :, x : x + 8, y : y + 8, z : z + 8])[-1].mean((0, 2, 3, 4))
        for x in (0, 6, 12)
        for y in (0, 5, 10)
        for z in (0, 8)
    ]
    encoder = FrozenEncoder.of(package, torch.device("cpu"))
    torch.testing.assert_close(encoder.embed(volume), torch.stack(vectors).mean(0), rtol=1e-5, atol=1e-6)


def test_the_table_reads_back_to_the_last_bit(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed(workspace)
    store = write_store(workspace / "store")
    rows = rows_of(workspace / "embeddings" / "tiny-on-store")
    assert [(r["volume"], r["patient"], r["split"], r["target"]) for r in rows] == [
        (m.volume, m.patient, m.split, str(m.target)) for m in store
    ]
    encoder = FrozenEncoder.of(workspace / "weights" / "tiny", torch.device("cpu"))
    for row in rows:
        read = np.array([float(row[f"v{i}"]) for i in range(8)], np.float32)
        assert np.array_equal(read, encoder.embed(store[row["volume"]]).numpy())
    assert "evaluate" in capsys.readouterr().out.splitlines()[-1]
    embed(workspace, "--split", "test", "--run", "two")
    assert [row["split"] for row in rows_of(workspace / "embeddings" / "two")] == ["test", "test"]


def test_scans_of_ones_own_have_hashed_ids_that_the_case_map_knows(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = write_scans(workspace.parent / "patients", 3)
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    embed(workspace, "--data", str(scans), "--weights", "tiny", "--run", "own")
    assert "quarantined" in capsys.readouterr().out
    text = (workspace / "embeddings" / "own" / "vectors.csv").read_text(encoding="utf-8")
    assert "scan" not in text
    with Workspace.at(str(workspace)).case_map.open(newline="", encoding="utf-8") as stream:
        known = {row["id"]: row["path"] for row in csv.DictReader(stream)}
    paths = [known[row["volume"]] for row in rows_of(workspace / "embeddings" / "own")]
    assert sorted(paths) == [str(scans / f"scan{number}.nii.gz") for number in range(3)]
    in_python = genesis.embed(workspace / "weights" / "tiny", scans, device="cpu")
    assert sorted(in_python) == sorted(paths)
    for row, path in zip(rows_of(workspace / "embeddings" / "own"), paths, strict=True):
        assert np.array_equal(in_python[path], np.array([float(row[f"v{i}"]) for i in range(8)], np.float32))


def test_the_name_is_the_function_whoever_imported_the_module(workspace: Path) -> None:
    import genesis.embed as module

    assert module is genesis.embed
    (workspace / "bad").mkdir()
    (workspace / "bad" / "broken.nii.gz").write_bytes(b"no scan")
    with pytest.raises(UserError, match="None of the scans"):
        genesis.embed(workspace / "weights" / "tiny", workspace / "bad", device="cpu")


def test_flat_networks_take_slices(workspace: Path) -> None:
    write_weights(workspace / "weights" / "flat", dims=2)
    embed(workspace, "--weights", "flat", "--run", "flat")
    assert len(rows_of(workspace / "embeddings" / "flat")) == 6


def test_refusals(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no weights package 'tinny'" in refused(workspace, capsys, "--weights", "tinny")
    assert "does not exist" in refused(workspace, capsys, "--data", str(tmp_path / "nowhere"))
    assert "no slashes" in refused(workspace, capsys, "--run", "../up")
    assert "There are no weights" in refused(tmp_path / "empty", capsys)
    write_store(tmp_path / "train" / "store", ("train", "train"))
    write_weights(tmp_path / "train" / "weights" / "tiny")
    assert "in the split test; there: train" in refused(tmp_path / "train", capsys, "--split", "test")
    file = workspace / "weights" / "tiny" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "damaged" in refused(workspace, capsys)
