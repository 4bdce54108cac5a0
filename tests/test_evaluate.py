"""Questions, arms, tables and refusals of the evaluation of frozen encoders."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import NAMES, write_store
from test_finetune import write_weights

from genesis.cli import main
from genesis.data.labelled import Classes
from genesis.data.organs import OrganPatches
from genesis.evaluation.cases import split_cases, training_counts
from genesis.evaluation.embedding import FrozenEncoder
from genesis.evaluation.frozen import Encoders, probe, search
from genesis.evaluation.questions import Organs, Targets, questions
from genesis.weights import read_card

SPLITS = ("train",) * 8 + ("val",) * 2 + ("test",) * 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_store(folder / "store", SPLITS)
    write_weights(folder / "weights" / "tiny")
    return folder


def evaluate(workspace: Path, *arguments: str) -> None:
    main(["evaluate", "--workspace", str(workspace), "--device", "cpu", *arguments])


def refused(workspace: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        evaluate(workspace, *arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_organ_patches_have_their_organ_at_the_centre(workspace: Path) -> None:
    store = write_store(workspace / "store", SPLITS)
    metas = list(store)[:4]
    how: dict[str, Any] = {"patch_size": (1, 1, 1), "spacing_mm": None, "window_hu": (-1000.0, 1000.0), "per_class": 3}
    patches = OrganPatches(store, metas, Classes.of(store, metas), seed=0, **how)
    assert len(patches) == 4 * 2 * 3
    assert patches.cases.tolist() == [case for case in range(4) for _ in range(6)]
    grey, bright = (
        [float(patches[i]["image"]) for i in range(len(patches)) if patches.labels[i] == label] for label in (1, 0)
    )
    assert min(bright) > 0.65 > max(grey)  # 500 HU and 0 HU
    again = OrganPatches(store, metas, Classes.of(store, metas), seed=0, **how)
    other = OrganPatches(store, metas, Classes.of(store, metas), seed=1, **how)
    assert all(torch.equal(patches[i]["image"], again[i]["image"]) for i in range(len(patches)))
    assert any(not torch.equal(patches[i]["image"], other[i]["image"]) for i in range(len(patches)))


def test_what_is_asked_follows_from_the_labels(workspace: Path, tmp_path: Path) -> None:
    data = read_card(workspace / "weights" / "tiny").data
    targets, organs = questions(write_store(workspace / "store", SPLITS), data)
    assert isinstance(targets, Targets)
    assert isinstance(organs, Organs)
    assert (targets.names, organs.names) == (("0", "1"), (NAMES[2], NAMES[5]))
    assert targets.labels("test").tolist() == [0, 1, 0, 1]


class Seen(FrozenEncoder):
    """Tells how bright the middle of a patch is, and the whole of it."""

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        middle = patches[:, :, 3:5, 3:5, 3:5]
        return torch.stack([middle.flatten(1).mean(1), patches.flatten(1).mean(1)], dim=1)


class Arms(Encoders):
    def each(self, arms: Any, seeds: Any) -> Iterator[tuple[str, int, FrozenEncoder]]:
        for arm, seed, encoder in super().each(arms, seeds):
            yield arm, seed, Seen(encoder.backbone, encoder.data, encoder.device) if arm == "pretrained" else encoder


def test_features_that_tell_organs_apart_win(workspace: Path) -> None:
    store = write_store(workspace / "store", SPLITS)
    package = workspace / "weights" / "tiny"
    _, organs = questions(store, read_card(package).data)
    arms = Arms(package, torch.device("cpu"))
    readings = probe(organs, arms, ("pretrained", "scratch"), (1, 8), (3, 4))
    assert [(r.arm, r.labels, r.seed) for r in readings] == [
        ("pretrained", 1, 3), ("pretrained", 8, 3), ("pretrained", 1, 4), ("pretrained", 8, 4),
        ("scratch", 1, 3), ("scratch", 8, 3), ("scratch", 1, 4), ("scratch", 8, 4),
    ]  # fmt: skip
    assert readings[1].values == readings[3].values  # all the cases, whatever the seed
    assert readings[5].values != readings[7].values  # another untrained network
    assert readings[1].values["linear accuracy"] > 0.8  # at the surface of a ball its brightness is mixed with air
    found, neighbours = search(organs, arms, ("pretrained",), (3,), 2, 5)
    assert found[0].labels == 10 * 2 * 4
    assert found[0].values["precision@1"] > 0.8
    assert found[0].values["chance"] == 0.5
    assert neighbours.candidates.shape == (2, 5)


def test_percentages_of_the_training_cases(workspace: Path) -> None:
    splits = split_cases(list(write_store(workspace / "store", SPLITS)))
    assert training_counts(["1%", "50%", "100%"], splits) == (1, 4, 8)
    assert training_counts(["3", "all"], splits) == (3, 8)


def test_probe_and_retrieval_write_their_answers(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(workspace, "--task", "probe", "--labels", "1", "all", "--seeds", "0", "1")
    folder = workspace / "evaluations" / "probe-tiny-on-store"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [answer["cases"] for answer in results["answers"]] == [{"train": 8, "validation": 2, "test": 4}] * 2
    target, organ = results["answers"]
    assert all(score["values"] == {} for score in target["scores"] if score["labels"] == 1)  # one case is of one class
    summary = {(row["labels"], row["arm"], row["value"]): row["n"] for row in organ["summary"]}
    assert summary[8, "scratch", "linear AUC"] == summary[1, "pretrained", "k-NN accuracy"] == 2
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "| 8 | pretrained − scratch |" in text
    assert text.strip() in capsys.readouterr().out
    evaluate(workspace, "--task", "retrieval", "--control", "none")
    folder = workspace / "evaluations" / "retrieval-tiny-on-store"
    assert {file.name for file in (folder / "figures").iterdir()} == {"targets.png", "organs.png"}
    assert "precision@5" in (folder / "results.md").read_text(encoding="utf-8")
    assert "Next: python -m genesis.evaluate --task probe" in capsys.readouterr().out.splitlines()[-1]


def test_refusals(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice" in refused(workspace, capsys, "--task", "porbe")
    assert "no weights package 'tinny'" in refused(workspace, capsys, "--task", "probe", "--weights", "tinny")
    assert "does not exist" in refused(workspace, capsys, "--task", "probe", "--data", str(tmp_path / "no.json"))
    assert "belongs to --task probe" in refused(workspace, capsys, "--task", "retrieval", "--labels", "3")
    assert "a percentage" in refused(workspace, capsys, "--task", "probe", "--labels", "few%")
    assert "ask for at most 8" in refused(workspace, capsys, "--task", "probe", "--labels", "900")
    write_store(tmp_path / "store", ("train", "train"))
    write_weights(tmp_path / "weights" / "tiny")
    assert "label more" in refused(tmp_path, capsys, "--task", "probe")


def test_test_cases_that_pretraining_saw_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_weights(workspace / "weights" / "leak", patients=("p13",))
    where = ("--task", "probe", "--weights", "leak", "--labels", "all", "--control", "none")
    assert "1 of 4 test cases were seen in pretraining" in refused(workspace, capsys, *where)
    assert not (workspace / "evaluations" / "probe-leak-on-store").exists()
    evaluate(workspace, *where, "--allow-overlap")
    assert "too good" in (workspace / "evaluations" / "probe-leak-on-store" / "results.md").read_text(encoding="utf-8")
