"""The verb: from what discover left to a run, and what a user is told who asks for something else."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genesis import cli
from genesis.config import load_config
from genesis.data.pseudo_labels import PseudoLabels
from genesis.data.store import VolumeMeta, VolumeStore, write_volume
from genesis.engine import preflight, trainer
from genesis.engine.checkpoint import read_checkpoint
from genesis.engine.method import Batch, Output
from genesis.files import read_json, sha256, write_folder_aside, write_json
from genesis.methods.semantic_genesis import SemanticGenesis
from genesis.workspace import Workspace

SIDE, PATCH, CLASSES = 32, 16, 3
DATA = {"patch_size": [PATCH] * 3, "spacing_mm": "median", "window_hu": [-1000.0, 1000.0]}
TINY = [
    "network.channels=[4,8]", "network.strides=[2]", "network.num_res_units=1", "train.batch_size=4",
    "train.validate_every=2", "train.validation_samples=5", "train.optimizer.warmup_steps=0", "train.workers=0",
]  # fmt: skip
ARGUMENTS = [argument for setting in TINY for argument in ("--set", setting)]


def make_store(folder: Path) -> None:
    """Eight patients: a bright ball at a place of its own in noise; six to train on, one held out, one for test."""
    source = np.random.default_rng(0)
    grid = np.indices((SIDE,) * 3)
    for number in range(8):
        centre = source.integers(10, 22, 3)
        ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < 36
        array = (1000 * ball + source.normal(-500, 50, ball.shape)).astype(np.int16)[None]
        meta = VolumeMeta(
            volume=f"v{number}", patient=f"p{number}", source=f"v{number}", modality="ct", shape=array.shape,
            spacing_mm=(2.0, 2.0, 2.0), affine=tuple(map(tuple, np.diag([2.0, 2, 2, 1]).tolist())), scale=(1.0,),
            offset=(0.0,), clipped_share=0.0, percentiles=((-600.0, 600.0),), foreground_box=((0, SIDE),) * 3,
            split={6: "val", 7: "test"}.get(number, "train"), labelled=False, target=None, values=(-800.0, 800.0),
        )  # fmt: skip
        write_volume(folder, array, meta)
    write_json(folder / "audit.json", {"label_names": {}, "sample": False})


def make_discovery(folder: Path, data: dict[str, Any], shift: float = 0.0) -> None:
    rows = [(volume, label) for volume in range(7) for label in range(CLASSES)]
    volumes = np.array([volume for volume, _ in rows])
    labels = np.array([label for _, label in rows])
    ids = np.array([f"v{volume}" for volume in volumes])
    patients = np.array([f"p{volume}" for volume in volumes])
    same = np.zeros(len(rows))
    table = PseudoLabels(
        class_=labels, reference=np.repeat("v0", len(rows)), volume=ids, patient=patients,
        rank=volumes, distance=same, x=same, y=same, z=same, sx=same + PATCH, sy=same + PATCH, sz=same + PATCH,
        cx_mm=20.0 + 10 * labels + shift, cy_mm=same + 30, cz_mm=same + 30,
        split=np.where(volumes == 6, "val", "train"),
    )  # fmt: skip
    with write_folder_aside(folder) as aside:
        table.write(aside / "pseudo_labels.csv")
        write_json(
            aside / "discovery.json",
            {
                "schema": 1, "dim": "3d", "seed": 0, "modality": "ct", "in_channels": 1, "spacing_mm": [2.0, 2.0, 2.0],
                "data": data, "discovery": load_config("semantic_genesis_3d").model_dump(mode="json")["discovery"],
                "pseudo_labels_sha256": sha256(aside / "pseudo_labels.csv"),
            },
        )  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    make_store(tmp_path / "store")
    make_discovery(tmp_path / "discovery" / "3d", DATA)
    return tmp_path


def train(workspace: Path, *arguments: str, tiny: bool = True) -> None:
    torch.set_num_threads(1)
    cli.main(["train", "--workspace", str(workspace), "--device", "cpu", *(ARGUMENTS if tiny else []), *arguments])


def contents(workspace: Path) -> list[Path]:
    """All files and folders but the store's index, which any reading makes once the store is two seconds old."""
    return sorted(path for path in workspace.rglob("*") if path.name != "index.txt")


@pytest.fixture
def refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run with arguments that are a mistake; the message, when all is as it should be."""

    def run(*arguments: str, tiny: bool = True) -> str:
        before = contents(workspace)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(workspace, *arguments, tiny=tiny)
        assert stop.value.code == 2
        assert contents(workspace) == before
        *_, message = capsys.readouterr().err.splitlines()  # after a progress display, if any
        assert message.startswith("genesis train: ")
        return message

    return run


def test_a_run_is_written(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(workspace, "--steps", "4", "--seed", "3")
    folder = workspace / "runs" / "semantic_genesis_3d"
    record = read_json(folder / "run.json")
    assert {name: record[name] for name in ("kind", "dim", "method", "seed", "status", "in_channels", "modality")} == {
        "kind": "train", "dim": "3d", "method": "semantic_genesis", "seed": 3, "status": "finished", "in_channels": 1,
        "modality": "ct",
    }  # fmt: skip
    assert record["spacing_mm"] == [2, 2, 2]
    assert record["trained"] == ["encoder", "decoder"]
    assert record["cohort"] == {
        "key": Workspace(workspace).id_key_hash(),
        "patients": [f"p{i}" for i in range(7)],
        "volumes": [f"v{i}" for i in range(7)],
        "seen": [],  # the volumes of this store carry no hashes of their voxels
    }
    assert load_config(str(folder / "config.yaml")).data.model_dump(mode="json") == {**DATA, "resident": "auto"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["split"]) for row in rows] == [(2, "train"), (2, "val"), (4, "train"), (4, "val")]
    assert {"mse", "input_mse", "mean_mse", "accuracy", "chance", "knn_accuracy"} <= set(rows[-1])
    assert read_checkpoint(folder / "checkpoints" / "last.pt")["step"] == 4
    for picture in ("restorations", "learning_curves"):
        assert (folder / "figures" / f"{picture}.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "18 patches of 3 classes; 3 patches of held-out patients" in out
    assert "against" in out
    assert out.splitlines()[-1] == f"The run is in {folder}; next: python -m genesis.export --workspace {workspace}"

    train(workspace, "--steps", "2")  # a second one does not touch the first
    assert (workspace / "runs" / "semantic_genesis_3d-2" / "run.json").is_file()
    assert read_json(folder / "run.json") == record


def test_an_interrupted_run_goes_on_to_the_same_bits(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(workspace, "--steps", "6", "--run", "whole")
    save = trainer.write_checkpoint

    def stop_after(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if path.name == "last.pt" and state["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "write_checkpoint", stop_after)
    with pytest.raises(SystemExit) as stop:
        train(workspace, "--steps", "6", "--run", "parts")
    assert stop.value.code == 130
    again = f"python -m genesis.train --resume --run parts --dim 3d --device cpu --workspace {workspace}"
    assert capsys.readouterr().out.splitlines()[-1] == again
    whole, parts = workspace / "runs" / "whole", workspace / "runs" / "parts"
    assert read_json(parts / "run.json")["status"] == "stopped"

    train(workspace, "--resume", "--run", "parts", tiny=False)
    for name in ("run.json", "config.yaml", "metrics.jsonl"):
        assert (whole / name).read_text(encoding="utf-8") == (parts / name).read_text(encoding="utf-8")
    states = [read_checkpoint(folder / "checkpoints" / "last.pt")["method"] for folder in (whole, parts)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    train(workspace, "--resume", "--run", "parts", "--steps", "8", tiny=False)  # a finished one may go further
    assert read_checkpoint(parts / "checkpoints" / "last.pt")["step"] == 8


def test_the_progress_line_says_how_fast_it_is(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(workspace, "--steps", "4")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("training 4/4 steps · "))
    found = re.search(r" · patches/s (\S+) · data wait (\d+)% · loss \d", line)
    assert found
    assert float(found[1]) > 0
    assert 0 <= int(found[2]) <= 100


def test_a_trace_of_a_run_that_is_finished_is_none(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(workspace, "--steps", "6", "--run", "traced", "--profile", "2")
    trace, none = workspace / "runs" / "traced" / "trace.json", "--profile wrote no trace: too few steps were left"
    out = capsys.readouterr().out
    assert f"Trace of 2 steps: {trace}" in out
    assert none not in out
    written = trace.read_bytes()
    train(workspace, "--resume", "--run", "traced", "--profile", "2", tiny=False)
    assert none in capsys.readouterr().out
    assert trace.read_bytes() == written


def test_classification_only_says_so(workspace: Path) -> None:
    train(workspace, "--steps", "2", "--set", "method.lambda_rec=0")
    folder = workspace / "runs" / "semantic_genesis_3d"
    assert read_json(folder / "run.json")["trained"] == ["encoder"]
    assert not (folder / "figures" / "restorations.png").exists()


def test_train_before_discover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == 2
    again = f"python -m genesis.discover --dim 3d --workspace {tmp_path}"
    assert f"make them first with: {again}" in capsys.readouterr().err


def test_a_data_section_that_contradicts_discovery(refused: Callable[..., str]) -> None:
    message = refused("--set", "data.patch_size=[32,32,32]")
    assert "data.patch_size is [32, 32, 32], but discovery used [16, 16, 16]" in message
    assert "data.patch_size is [64, 64, 32], but" in refused("--config", "semantic_genesis_3d")


def test_resident_volumes_train_as_streamed_ones(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_discovery(workspace / "discovery" / "3d", DATA, shift=-20.0)  # patches that reach out of their volumes
    train(workspace, "--steps", "4", "--run", "streamed", "--set", "data.resident=0")
    assert "Patches stream from the store" in capsys.readouterr().out
    train(workspace, "--steps", "4", "--run", "kept")
    assert "Patches are cut on cpu: the 7 volumes take 0.000459 GB" in capsys.readouterr().out
    runs = [(workspace / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("streamed", "kept")]
    for streamed, kept in zip(*(run.splitlines() for run in runs), strict=True):
        one, other = json.loads(streamed), json.loads(kept)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        if one["split"] == "train":
            assert other["padding"] == pytest.approx(one["padding"])
            assert 0 < one["padding"] < 1


def test_more_resident_data_than_memory(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genesis.data.resident._memory", lambda device: (10**6, 10**6))
    assert "enough for 4; use data.resident=0.46." in refused("--set", "data.resident=0.3")


def test_an_agreeing_data_section_is_accepted(workspace: Path) -> None:
    make_discovery(workspace / "discovery" / "3d", {**DATA, "spacing_mm": [2.0, 2.0, 2.0]})
    train(workspace, "--steps", "1", "--set", "data.patch_size=[16,16,16]")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dim", "2d"], "make them first with: python -m genesis.discover --dim 2d"),
        (["--config", "semantic_genesis_2d"], "is 2D; pass --dim 2d"),
        (["--steps", "0"], "train.steps: Input should be greater than 0 (got 0)"),
        (["--set", "network.strides=[2,2]"], "must have one number fewer than"),
        (["--set", "network.channels=[4,8,16,32,64,128]", "--set", "network.strides=[2,2,2,2,2]"], "multiples of 32"),
        (
            ["--set", "network.channels=[4,8,8,8,8]", "--set", "network.strides=[2,2,2,2]"],
            "at least one of them larger",
        ),
        (["--run", "a/b"], "no slashes"),
        (
            ["--steps", "2", "--profile", "2"],
            "--profile 2: expected a positive number of steps, fewer than the run's 2.",
        ),
        (["--profile", "-1"], "--profile -1: expected a positive number of steps, fewer than the run's"),
        (["--dry-run", "--profile", "2"], "--dry-run writes nothing, so no trace either: leave out --profile"),
        (["--resume"], "--config and --set belong to a new run"),
        (["--set", "method.lambda_rec=0", "--set", "method.lambda_cls=0"], "nothing would be learned."),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str, refused: Callable[..., str]) -> None:
    assert words in refused(*arguments)


def test_resuming_loses_nothing(workspace: Path, refused: Callable[..., str]) -> None:
    train(workspace, "--steps", "4", "--run", "whole")
    assert "has 4 steps already" in refused("--resume", "--run", "whole", "--steps", "2", tiny=False)
    assert "pass --dim 3d" in refused("--resume", "--run", "whole", "--dim", "2d", tiny=False)
    checkpoints = workspace / "runs" / "whole" / "checkpoints"
    last = (checkpoints / "last.pt").read_bytes()
    (checkpoints / "last.pt").write_bytes(last[:1000])
    record = (workspace / "runs" / "whole" / "run.json").read_bytes()
    previous = (checkpoints / "previous.pt").read_bytes()
    (checkpoints / "previous.pt").write_bytes(previous[:1000])
    assert "is damaged" in refused("--resume", "--run", "whole", "--steps", "6", tiny=False)
    assert (workspace / "runs" / "whole" / "run.json").read_bytes() == record
    (checkpoints / "previous.pt").write_bytes(previous)
    train(workspace, "--resume", "--run", "whole", "--steps", "6", tiny=False)  # from the one before
    assert read_checkpoint(checkpoints / "last.pt")["step"] == 6
    assert (checkpoints / "damaged-after-2.pt").read_bytes() == last[:1000]
    for name in ("last.pt", "previous.pt"):
        (checkpoints / name).unlink()
    assert "cannot go on" in refused("--resume", "--run", "whole", tiny=False)


def test_a_diverged_training_is_no_success(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train(workspace, "--steps", "4", "--set", "train.optimizer.learning_rate=1e30")
    assert stop.value.code == 2
    assert "diverged: no validation" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "SECONDS", 0.0)
    before = sorted(workspace.rglob("*"))
    train(workspace, "--dry-run")
    assert sorted(workspace.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "Measured on 5 steps of 4 patches; nothing was written."
    assert [line.split()[0] for line in lines[3:]] == ["time", "memory", "disk"]


def test_a_batch_that_cannot_fit_leaves_nothing(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, workspace: Path
) -> None:
    forward = SemanticGenesis.forward

    def hungry(self: SemanticGenesis, batch: Batch) -> Output:
        if len(batch["image"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch)

    (workspace / "runs").mkdir()
    monkeypatch.setattr(SemanticGenesis, "forward", hungry)
    assert "4 patches at once do not fit into the memory of this machine, 2 do" in refused()
    assert "divided among 1 process with 3 parts each; one of 3 or 6 can" in refused("--set", "train.accumulate=3")
    smaller = ("train.accumulate=2", "train.recompute_activations=true", "train.validation_samples=2")
    train(workspace, "--steps", "1", *(part for change in smaller for part in ("--set", change)))


@pytest.mark.slow
def test_torchrun_equals_one_process(workspace: Path) -> None:
    arguments = ["--workspace", str(workspace), "--device", "cpu", "--steps", "3", *ARGUMENTS]
    arguments += ["--set", "train.optimizer.name=sgd", "--set", "train.accumulate=2"]
    cli.main(["train", *arguments, "--run", "one"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, "-m", "genesis.train", "--", "--run", "two", *arguments],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    one, two = (read_checkpoint(workspace / "runs" / name / "checkpoints" / "last.pt") for name in ("one", "two"))
    assert all(torch.allclose(value, two["method"][name], atol=1e-5) for name, value in one["method"].items())


def test_resuming_what_is_not_there(refused: Callable[..., str]) -> None:
    assert "There is no train run" in refused("--resume", tiny=False)
    assert "There is no run 'x'" in refused("--resume", "--run", "x", tiny=False)


def test_a_taken_name_and_a_changed_discovery(workspace: Path, refused: Callable[..., str]) -> None:
    train(workspace, "--steps", "1", "--run", "first")
    assert "There is a run first" in refused("--run", "first")
    make_discovery(workspace / "discovery" / "3d", DATA, shift=2.0)
    assert "made anew since" in refused("--resume", "--run", "first", tiny=False)


def test_a_patient_who_moved_to_the_test_split(workspace: Path, refused: Callable[..., str]) -> None:
    """Labels that came after discovery may give a patient it has seen to the test split."""
    volume = VolumeStore(workspace / "store")["v2"]
    write_volume(workspace / "store", volume.read(), replace(volume.meta, split="test"))
    assert "1 volumes have moved to another split" in refused("--steps", "2")


def test_a_damaged_table(workspace: Path, refused: Callable[..., str]) -> None:
    table = workspace / "discovery" / "3d" / "pseudo_labels.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("20.0", "21.0", 1), encoding="utf-8")
    assert "pseudo_labels.csv is damaged" in refused()
