"""A run becomes a package that loads, or one is told why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genesis import cli, load_into, load_pretrained
from genesis.config import load_config
from genesis.engine.checkpoint import write_checkpoint
from genesis.files import write_json
from genesis.methods.semantic_genesis import SemanticGenesis
from genesis.models import Backbone, build_backbone
from genesis.transforms import Corruption
from genesis.weights import read_card

NETWORK: dict[str, Any] = dict(channels=(4, 8), strides=(2,), num_res_units=1)


def write_run(folder: Path, seed: int = 0, **record: Any) -> Backbone:
    """A run as `train` leaves it, with different networks in its best and last checkpoint; returns the best's."""
    torch.manual_seed(seed)
    best, last = (build_backbone("unet", spatial_dims=3, in_channels=2, out_channels=2, **NETWORK) for _ in range(2))
    rows = []
    for name, backbone, step in (("best", best, 40), ("last", last, 60)):
        method = SemanticGenesis(backbone, 3, Corruption())
        write_checkpoint(folder / "checkpoints" / f"{name}.pt", {"step": step, "method": method.state_dict()})
        rows += [{"step": step, "split": split, "loss": step / 100, "accuracy": None} for split in ("train", "val")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = [
        f"network.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in NETWORK.items()
    ]
    (folder / "config.yaml").write_text(load_config("semantic_genesis_3d", overrides).dump(), encoding="utf-8")
    write_json(
        folder / "run.json",
        {
            "kind": "train",
            "dim": "3d",
            "method": "semantic_genesis",
            "seed": 7,
            "status": "finished",
            "spacing_mm": [1.0, 1.0, 2.0],
            "in_channels": 2,
            "modality": "mr",
            "trained": ["encoder", "decoder"],
            "cohort": {"patients": ["p"], "volumes": ["p-0", "p-1"]},
        }
        | record,
    )
    return best


def export(workspace: Path, *arguments: str) -> None:
    cli.main(["export", "--workspace", str(workspace), *arguments])


def test_the_newest_run_becomes_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = write_run(tmp_path / "runs" / "first")
    export(tmp_path)
    package = tmp_path / "weights" / "first"
    network = load_pretrained(package)
    state = backbone.network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert load_into(backbone.network, package, quiet=True).share == 1

    card = read_card(package)
    assert card.trained == ("encoder", "decoder")
    assert card.data.modality == "mr"
    assert card.data.window_hu is None  # it is of CT
    assert card.data.spacing_mm == (1, 1, 2)
    assert card.data.patch_size == (64, 64, 32)
    assert (card.pretraining.steps, card.pretraining.seed) == (40, 7)
    assert card.pretraining.metrics == {"loss": 0.4, "accuracy": None}
    assert card.pretraining.cohort.volumes == ("p-0", "p-1")
    lines = capsys.readouterr().out.splitlines()
    assert "best checkpoint (step 40)" in lines[0]
    assert lines[-1].startswith(f"The weights are in {package}; next: python -m genesis.finetune --weights first")


def test_run_name_and_checkpoint_can_be_chosen(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first")
    write_run(tmp_path / "runs" / "second", seed=1)
    export(tmp_path, "--run", "first", "--name", "mine", "--checkpoint", "last")
    pretraining = read_card(tmp_path / "weights" / "mine").pretraining
    assert (pretraining.steps, pretraining.metrics["loss"]) == (60, 0.6)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["mine"]


def test_without_restoration_only_the_encoder_is_trained(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first", trained=["encoder"])
    export(tmp_path)
    assert read_card(tmp_path / "weights" / "first").trained == ("encoder",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "other"], "no run 'other'"),
        (["--run", "tuned"], "is a finetune run"),
        (["--name", "../mine"], "has no slashes"),
        (["--run", "unfinished"], "no checkpoint"),
        (["--run", "damaged"], "is damaged"),
        (["--run", "foreign"], "does not hold the network of its config"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    runs = tmp_path / "runs"
    for name in ("foreign", "damaged", "unfinished", "whole"):
        write_run(runs / name)
    write_run(runs / "tuned", kind="finetune")
    (runs / "unfinished" / "checkpoints" / "best.pt").unlink()
    checkpoint = runs / "damaged" / "checkpoints" / "best.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    config = runs / "foreign" / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("num_res_units: 1", "num_res_units: 3"), encoding="utf-8"
    )
    with pytest.raises(SystemExit) as stop:
        export(tmp_path, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "weights").exists()


def test_no_run_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        export(tmp_path)
    assert stop.value.code == 2
    assert "python -m genesis.train" in capsys.readouterr().err
