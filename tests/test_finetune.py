"""Arms that differ in their initial weights alone, picked learning rates, kept work, tables, the verb's refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import write_store

from genesis.cli import main
from genesis.config import load_config
from genesis.data.labelled import Classes
from genesis.engine.method import Batch, Method, Output
from genesis.engine.monitor import read_metrics
from genesis.evaluation import arms as arms_module
from genesis.evaluation.arms import Experiment
from genesis.evaluation.cases import choose, split_cases
from genesis.evaluation.comparison import Score, as_table, average, difference
from genesis.evaluation.tasks import SegmentationTask
from genesis.models import build_backbone
from genesis.weights import CohortCard, DataCard, PretrainingCard, load_pretrained, read_card, write_package
from genesis.workspace import Workspace

SETTINGS = [
    "finetune.steps=4", "finetune.batch_size=2", "finetune.learning_rates=[0.001,0.01]", "finetune.validate_every=2",
    "finetune.warmup_steps=1", "finetune.workers=0",
]  # fmt: skip


def write_weights(folder: Path, *, dims: int = 3, patients: tuple[str, ...] = (), key: str | None = None) -> Path:
    """A package of an untrained tiny network."""
    torch.manual_seed(3)
    backbone = build_backbone("unet", spatial_dims=dims, channels=(4, 8), strides=(2,), num_res_units=0)
    write_package(
        folder,
        backbone,
        data=DataCard(
            modality="ct", window_hu=(-1000, 1000), spacing_mm=(2.0, 2.0, 3.0)[:dims], patch_size=(8,) * dims
        ),
        pretraining=PretrainingCard(
            method="semantic_genesis",
            steps=1,
            seed=0,
            metrics={},
            cohort=CohortCard(key=key, patients=patients, volumes=()),
        ),
    )
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    write_weights(tmp_path / "weights" / "tiny")
    return tmp_path


@pytest.fixture
def experiment(workspace: Path) -> Experiment:
    store = write_store(workspace / "store")
    classes = Classes.of(store, list(store))
    package = workspace / "weights" / "tiny"
    return Experiment(
        folder=workspace / "runs" / "one",
        task=SegmentationTask(store, (8, 8, 8), (2.0, 2.0, 3.0), (-1000.0, 1000.0), classes, 0.1, 0.7),
        splits=split_cases(list(store)),
        package=package,
        card=read_card(package),
        in_channels=1,
        settings=load_config("semantic_genesis_3d", SETTINGS).finetune,
        device=torch.device("cpu"),
        id_key_hash="key",
    )


def finetune(workspace: Path, *arguments: str) -> None:
    overrides = [part for setting in SETTINGS for part in ("--set", setting)]
    main(["finetune", "--workspace", str(workspace), "--device", "cpu", *overrides, *arguments])


def refused(workspace: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        finetune(workspace, *arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


class Recorder(Method):
    """Stands in for the segmentation; remembers the bytes that it was shown."""

    def __init__(self, seen: list[bytes]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = seen

    def forward(self, batch: Batch) -> Output:
        self.seen.append(b"".join(value.numpy().tobytes() for _, value in sorted(batch.items())))
        return Output({"loss": self.weight.square().sum()})

    def validate(self, batches: Any) -> dict[str, float]:
        return {"loss": 1.0}


def test_arms_and_learning_rates_see_the_same_batches(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, float], list[bytes]] = {}
    for arm in ("pretrained", "scratch"):
        for rate in (0.001, 0.01):
            batches = seen.setdefault((arm, rate), [])
            monkeypatch.setattr(Experiment, "_model", lambda self, arm, seed, b=batches: (None, Recorder(b)))
            experiment._train(arm, 2, 0, rate)
    (first, *others) = seen.values()
    assert len(first) == 4
    assert len(set(first)) == 4
    assert all(other == first for other in others)


def test_arms_differ_in_loaded_weights_only(experiment: Experiment) -> None:
    pretrained, scratch = (experiment._model(arm, 0)[0] for arm in ("pretrained", "scratch"))
    package = load_pretrained(experiment.package).state_dict()
    for key, value in pretrained.network.state_dict().items():
        if key in pretrained.output_keys:
            assert torch.equal(value, scratch.network.state_dict()[key])
        else:
            assert torch.equal(value, package[key])
            if value.ndim > 1:  # the slopes of PReLUs begin alike
                assert not torch.equal(value, scratch.network.state_dict()[key])
    assert all(parameter.requires_grad for parameter in pretrained.parameters())


def test_each_arm_takes_its_best_learning_rate(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {("pretrained", 0.001): 0.2, ("pretrained", 0.01): 0.3, ("scratch", 0.001): 0.5, ("scratch", 0.01): 0.4}
    trained = []

    def train(self: Experiment, arm: str, labels: int, seed: int, rate: float) -> None:
        folder = self.sub_run(arm, labels, seed, rate)
        if not (folder / "trained.json").exists():
            trained.append((arm, seed, rate))
            arms_module.write_json(folder / "trained.json", {"loss": losses[arm, rate], "step": 4})
        arms_module.write_json(folder / "test.json", {"values": {"mean": 0.5}, "cases": {}})

    monkeypatch.setattr(Experiment, "_train", train)
    scores = experiment.run(("pretrained", "scratch"), (2,), (4, 5))
    assert [(s.arm, s.seed, s.learning_rate) for s in scores] == [
        ("pretrained", 4, 0.001), ("pretrained", 5, 0.001), ("scratch", 4, 0.01), ("scratch", 5, 0.01),
    ]  # fmt: skip
    assert trained == [
        ("pretrained", 4, 0.001), ("pretrained", 4, 0.01), ("pretrained", 5, 0.001),
        ("scratch", 4, 0.001), ("scratch", 4, 0.01), ("scratch", 5, 0.01),
    ]  # fmt: skip


def test_fewer_cases_are_part_of_more_and_targets_take_turns(experiment: Experiment) -> None:
    metas = list(experiment.task.store)
    assert choose(metas, 3, seed=1) == choose(metas, 6, seed=1)[:3]
    assert any(choose(metas, 6, seed=1) != choose(metas, 6, seed=seed) for seed in (2, 3, 4))
    for seed in range(5):
        assert {meta.target for meta in choose(metas, 2, seed)} == {0, 1}


def test_validation_is_topped_up_by_patient_and_test_never(tmp_path: Path) -> None:
    store = write_store(tmp_path, ("train",) * 18 + ("test",) * 3)
    splits = split_cases(list(store))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 2, 3)
    assert set(splits.validation) == set(split_cases(list(store)[::-1]).validation)
    assert {m.patient for m in splits.train}.isdisjoint({m.patient for m in splits.validation})


def test_table_has_mean_sd_and_paired_difference() -> None:
    values = {("a", 0): 0.8, ("a", 1): 0.6, ("b", 0): 0.7, ("b", 1): 0.55}
    scores = [Score(arm, 5, seed, 0.01, 0.3, {"mean": v, "liver": v}) for (arm, seed), v in values.items()]
    mean = average(scores, "a", 5, "mean")
    assert mean is not None
    assert (mean.mean, mean.sd, mean.n) == (pytest.approx(0.7), pytest.approx(0.1414, abs=1e-4), 2)
    gain = difference(scores, "a", "b", 5, "liver")
    assert gain is not None
    assert (gain.mean, gain.sd, gain.n) == (pytest.approx(0.075), pytest.approx(0.0354, abs=1e-4), 2)
    assert difference(scores, "a", "b", 5, "spleen") is None
    table = as_table(scores, ("a", "b"), ("liver", "spleen"))
    assert "| 5 | a | 70.0 ± 14.1 | 70.0 ± 14.1 | – | 2 | 0.01 |" in table
    assert "| 5 | a − b | +7.5 ± 3.5 | +7.5 ± 3.5 | – | 2 pairs | |" in table


def test_the_verb_from_start_to_end_and_again(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--labels", "1", "all", "--seeds", "0", "1", "--run", "one")
    finetune(workspace, *arguments)
    printed = capsys.readouterr().out
    assert "3 for training, 1 for validation, 2 for test" in printed
    assert "python -m genesis.predict --model one" in printed.splitlines()[-1]
    run = workspace / "runs" / "one"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert {(s["arm"], s["labels"], s["seed"]) for s in results["scores"]} == {
        (arm, labels, seed) for arm in ("pretrained", "scratch") for labels in (1, 3) for seed in (0, 1)
    }
    assert {row["class"] for row in results["differences"]} == {"mean", "bright", "grey"}
    assert all(row["n"] == 2 for row in results["differences"])
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    card = read_card(run / "model")
    assert card.task is not None
    assert card.task.labels == {0: "background", 2: "bright", 5: "grey"}
    assert load_pretrained(run / "model")(torch.zeros(1, 1, 8, 8, 8)).shape[1] == 3
    assert (run / "figures" / "predictions.png").stat().st_size > 10_000
    assert (run / "figures" / "learning_curves.png").stat().st_size > 10_000

    # again: what is finished stays, what is missing is made
    one, two = (run / "scratch" / "1-labels" / f"seed-{seed}" for seed in (0, 1))
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("trained.json") if two not in path.parents}
    before = json.loads((run / "results.json").read_text(encoding="utf-8"))
    shutil.rmtree(two)
    finetune(workspace, *arguments)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((run / "results.json").read_text(encoding="utf-8")) == before
    assert one.is_dir()

    # another first seed picks the learning rates anew, among models that are there
    finetune(workspace, "--labels", "1", "all", "--seeds", "1", "0", "--run", "one")

    # other settings are another experiment, and so are corrected labels
    assert "--run NAME" in refused(workspace, capsys, *arguments, "--set", "finetune.steps=5")
    write_store(workspace / "store", names={2: "bright", 5: "dark"})
    assert "has another labels" in refused(workspace, capsys, *arguments)


def test_hashes_of_another_key_tell_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Patients are compared by hashes; those of two keys differ for one patient, which must not pass for unseen."""
    own = Workspace(workspace).id_key_hash()
    for name, key, words in (("near", own, "None of the 2 test patients"), ("far", "other", "cannot be told")):
        write_weights(workspace / "weights" / name, patients=("p90",), key=key)
        finetune(workspace, "--weights", name, "--labels", "1", "--control", "none")
        assert words in capsys.readouterr().out
        seen = read_card(workspace / "runs" / f"{name}-on-store" / "model").pretraining.cohort
        assert seen.key == key
        assert len(seen.patients) == (5 if key == own else 1)


def test_an_interrupted_training_goes_on(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = experiment.sub_run("scratch", 2, 0, 0.01)
    experiment._train("scratch", 2, 0, 0.01)
    rows = read_metrics(whole, "val")
    best = torch.load(whole / "checkpoints" / "best.pt")["method"]
    shutil.rmtree(whole)

    fit = arms_module.fit

    def interrupted(method: Method, *args: Any, **kwargs: Any) -> None:
        class Stop(Exception):
            pass

        steps = 0

        def stop(step: int) -> None:
            nonlocal steps
            steps += 1
            if steps == 4:
                raise Stop

        monkeypatch.setattr(method, "before_optimizer_step", stop)
        with pytest.raises(Stop):
            fit(method, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(arms_module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment._train("scratch", 2, 0, 0.01)
    assert not (whole / "trained.json").exists()
    monkeypatch.setattr(arms_module, "fit", fit)
    experiment._train("scratch", 2, 0, 0.01)
    assert read_metrics(whole, "val") == rows
    again = torch.load(whole / "checkpoints" / "best.pt")["method"]
    assert all(torch.equal(best[key], again[key]) for key in best)


def test_classification(workspace: Path) -> None:
    finetune(workspace, "--task", "classification", "--control", "none", "--run", "classes")
    results = json.loads((workspace / "runs" / "classes" / "results.json").read_text(encoding="utf-8"))
    assert results["metric"] == "auc"
    assert results["differences"] == []
    assert read_card(workspace / "runs" / "classes" / "model").trained == ("encoder",)


def test_slices(tmp_path: Path) -> None:
    """The 2D path, on volumes, is the same."""
    write_store(tmp_path / "store")
    write_weights(tmp_path / "weights" / "flat", dims=2)
    finetune(tmp_path, "--labels", "2", "--run", "flat", "--set", "finetune.learning_rates=[0.01]")
    assert json.loads((tmp_path / "runs" / "flat" / "results.json").read_text(encoding="utf-8"))["cases"]["test"] == 2


def test_refusals(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(workspace, capsys, "--labels", "4")
    assert "--labels 4" in message
    assert "3 labelled training cases" in message
    assert "ask for at most 3" in message
    assert "expected a number of cases" in refused(workspace, capsys, "--labels", "few")
    assert "multiples of 2" in refused(workspace, capsys, "--set", "finetune.patch_size=[9,8,8]")
    assert "no weights package 'none'" in refused(workspace, capsys, "--weights", "none")
    assert "does not exist" in refused(workspace, capsys, "--data", str(workspace / "nowhere"))
    write_weights(workspace / "weights" / "leaky", patients=("p00", "p04"))
    message = refused(workspace, capsys, "--weights", "leaky")
    assert "1 of 2 test cases were seen" in message
    assert "test case v04: other scans of its patient p04" in message
    finetune(workspace, "--weights", "leaky", "--labels", "1", "--control", "none", "--allow-overlap", "--run", "leaky")
    assert "so these figures are too good" in (workspace / "runs" / "leaky" / "results.md").read_text(encoding="utf-8")
    write_store(workspace / "store", ("train",) * 6)
    assert "0 for test" in refused(workspace, capsys, "--weights", "tiny")
    shutil.rmtree(workspace / "weights")
    assert "genesis.export" in refused(workspace, capsys)
