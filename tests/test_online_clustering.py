"""Online clustering over modalities: blocks of prototypes, the hybrid objective, mixed stores through the verbs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_swav import COUNT, DIM, in_two_processes, parts_of, patches
from test_train import SIDE, TINY
from torch.nn import functional

from genesis import cli
from genesis.config import load_config
from genesis.data.samplers import NO_TARGET
from genesis.data.store import Modality, VolumeMeta, write_volume
from genesis.engine.batch_norm import join_batch_norms
from genesis.engine.monitor import read_metrics
from genesis.errors import UserError
from genesis.files import read_json, write_json
from genesis.losses.clustering import sinkhorn, swapped_prediction_loss
from genesis.methods import METHODS, Facts
from genesis.methods.online_clustering import OnlineClustering
from genesis.models import Prototypes, build_backbone
from genesis.transforms import EnergyBands
from genesis.weights import read_card

CT, MR = 0, 1


def tiny(dims: int = 2, *, per: str = "modality", **settings: Any) -> OnlineClustering:
    prototypes = Prototypes(DIM, COUNT, (CT, MR) if per == "modality" else None)
    settings = {"modalities": ("ct", "mr"), "energy": EnergyBands(0.5, bands=2), "frozen_steps": 0, **settings}
    return OnlineClustering(*parts_of(dims), prototypes, **settings)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("per", ["modality", "shared"])
@pytest.mark.parametrize("targets", [(), (0, 1, 2)])
def test_gradients_reach_every_trained_parameter(dims: int, per: str, targets: tuple[int, ...]) -> None:
    method = tiny(dims, per=per, targets=targets, queue=8)
    output = method(method.prepare(patches(4, (20,) * dims)))
    assert set(output.losses) == {"clustering", "supervised"} if targets else {"clustering"}
    torch.stack(list(output.losses.values())).sum().backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_each_modality_has_its_own_sinkhorn_and_prototypes() -> None:
    """Ten samples together cost what those of each modality cost alone."""
    method = tiny().eval()
    batch = method.prepare(patches(10, (20, 20)))
    seen = method._see(batch)
    codes = method._codes(seen, batch["modality"])
    alone = []
    for modality, block in ((CT, slice(0, COUNT)), (MR, slice(COUNT, 2 * COUNT))):
        of = batch["modality"] == modality
        scores = seen.scores[:, of, block]
        assert scores.isfinite().all()
        expected = torch.stack([sinkhorn(view) for view in scores[:2]])
        assert torch.allclose(codes[:, of, block], expected, atol=1e-5)
        alone.append(float(swapped_prediction_loss(expected, scores.detach())))
    assert method(batch).losses["clustering"].item() == pytest.approx(np.mean(alone), rel=1e-5)
    assert codes[:, batch["modality"] == CT, COUNT:].abs().max() == 0


def test_energy_bands_change_some_of_the_views() -> None:
    without, with_ = tiny(energy=EnergyBands(0.0)), tiny(energy=EnergyBands(1.0))
    batch = patches(6, (20, 20))
    plain, changed = (method.pictures(method.prepare(batch))["views"] for method in (without, with_))
    assert list(plain) == ["region", "global 1", "global 2", "local 1", "local 2"]
    for name in list(plain)[1:]:
        difference = (plain[name] - changed[name]).abs().flatten(1).mean(1)
        assert (difference > 1e-4).all()
        assert changed[name].min() >= 0
        assert changed[name].max() <= 1
    gains = [(changed[name][0].std() / plain[name][0].std()).item() for name in ("global 1", "global 2")]
    assert abs(gains[0] - gains[1]) > 1e-3  # drawn apart


def test_the_hybrid_objective_is_the_sum_of_both() -> None:
    method = tiny(targets=(0, 2), alpha=0.5).eval()
    batch = patches(40, (20, 20))
    batch["target"] = torch.where(torch.arange(40) < 4, torch.tensor([0, 2, 2, 1]).repeat(10), NO_TARGET)
    batch = method.prepare(batch)
    output = method(batch)
    logits = method.classifier(method._see(batch).features[:, :3])  # class 1 is unknown in training
    expected = functional.cross_entropy(logits.flatten(0, 1), torch.tensor([0, 1, 1, 0, 1, 1]))
    assert output.losses["supervised"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.metrics["labelled"] == pytest.approx(3 / 40)
    assert output.losses["clustering"].item() == pytest.approx(0.5 * output.metrics["swapped"].item(), rel=1e-6)
    figures = method.validate([batch])
    assert figures["loss"] == pytest.approx(expected.item() + 0.5 * figures["swapped"], rel=1e-4)
    assert figures["target_accuracy"] == pytest.approx(
        float((logits.argmax(2) == torch.tensor([0, 1, 1])).float().mean())
    )
    assert figures["target_chance"] == pytest.approx(2 / 3)
    assert "accuracy of targets" in method.told(figures)[-1]


def test_a_batch_without_targets_has_the_same_metrics_and_no_supervised_loss() -> None:
    method = tiny(targets=(0, 1, 2))
    some = method(method.prepare(patches(10, (20, 20))))
    batch = method.prepare(patches(4, (20, 20), first=1))
    assert (batch["target"] == NO_TARGET).all()
    none = method(batch)
    assert none.losses.keys() == some.losses.keys()
    assert none.metrics.keys() == some.metrics.keys()
    assert none.losses["supervised"].item() == 0 < some.losses["supervised"].item()
    none.losses["supervised"].backward()
    assert method.classifier.weight.grad is not None
    assert method.classifier.weight.grad.abs().max() == 0


def test_figures_by_modality_also_where_one_is_missing() -> None:
    method = tiny(targets=(0, 1)).eval()
    batch = method.prepare(patches(12, (20, 20)))
    both = method.validate([batch])
    only_ct = {name: value[::2] for name, value in batch.items()}
    one = method.validate([{**only_ct, "target": torch.full((6,), NO_TARGET)}])
    assert one.keys() == both.keys()
    assert math.isfinite(one["loss"])
    assert math.isnan(one["code_entropy_mr"])
    assert math.isnan(one["target_accuracy"])
    assert one["code_entropy_ct"] == pytest.approx(one["code_entropy"])
    named = [f"{figure}_{name}" for figure in ("code_entropy", "prototype_usage") for name in ("ct", "mr")]
    assert all(0 < both[name] <= 1 for name in named)
    assert "ct " in method.told(both)[2]


def test_held_out_samples_of_a_modality_without_prototypes_do_no_harm() -> None:
    method = tiny().eval()
    batch = patches(12, (20, 20))
    batch["modality"][:2] = 2
    assert math.isfinite(method.validate([method.prepare(batch)])["loss"])


def build(overrides: list[str], facts: Facts) -> Any:
    config = load_config("online_clustering_2d", ["network.channels=[4,8]", "network.strides=[2]", *overrides])
    backbone = build_backbone(spatial_dims=2, **config.network.model_dump())
    return METHODS["online_clustering"](config, backbone, facts)


def test_what_a_cohort_lacks_is_told() -> None:
    with pytest.raises(UserError, match=r"all training volumes are ct: .*method\.prototypes\.per=shared"):
        build([], Facts(modalities=("ct",)))
    assert build(["method.prototypes.per=shared"], Facts(modalities=("ct",))).prototypes.shared
    with pytest.raises(UserError, match=r"hybrid is true, but the training volumes have 1 classes"):
        build(["method.hybrid=true"], Facts(modalities=("ct", "mr"), targets=(3,)))
    assert len(build(["method.hybrid=true"], Facts(modalities=("ct", "mr"), targets=(3, 5))).targets) == 2
    with pytest.raises(UserError, match=r"accumulate is 2, but online_clustering clusters whole batches"):
        load_config("online_clustering_3d", ["train.accumulate=2"])
    with pytest.raises(UserError, match=r"method\.prototypes\.per: expected 'modality' or 'shared'"):
        load_config("online_clustering_3d", ["method.prototypes.per=patient"])
    with pytest.raises(UserError, match=r"unknown key method\.epsilom; did you mean epsilon"):
        load_config("swav_3d", ["method.epsilom=1"])


def steps_of_a_process(rank: int, folder: Path, arrange: str) -> None:
    """Two steps with DDP; rank 1 is given the second half of every batch."""
    torch.manual_seed(0)
    method = tiny(targets=(0, 1, 2), queue=12, queue_start=1)
    join_batch_norms(method)
    model = torch.nn.parallel.DistributedDataParallel(method)
    _take(method, model, arrange, slice(4 * rank, 4 * rank + 4))
    torch.save(method.state_dict(), folder / f"{rank}.pt")


def _take(method: OnlineClustering, model: torch.nn.Module, arrange: str, share: slice) -> None:
    optimizer = torch.optim.SGD(method.param_groups(), 1e-2)
    for step in range(3):
        batch = method.prepare(patches(8, (20, 20), first=8 * step))
        order = batch["modality"].argsort(stable=True) if arrange == "apart" else torch.arange(8)
        part = {name: value[order][share] for name, value in batch.items()}
        torch.stack(list(model(part).losses.values())).sum().backward()
        method.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        method.after_optimizer_step(step)


@pytest.mark.slow
@pytest.mark.parametrize("arrange", ["mixed", "apart"])
def test_two_processes_equal_one(tmp_path: Path, arrange: str) -> None:
    """Also where one process has all CTs and the other all MRs; targets are in few of the shares."""
    in_two_processes(steps_of_a_process, tmp_path, arrange)
    torch.manual_seed(0)
    method = tiny(targets=(0, 1, 2), queue=12, queue_start=1)
    _take(method, method, arrange, slice(0, 8))
    before = tiny(targets=(0, 1, 2), queue=12, queue_start=1).state_dict()
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in method.state_dict().items():
            assert torch.allclose(state[name].double(), value.double(), atol=1e-5), name
        assert not torch.allclose(state["head.layers.3.weight"], before["head.layers.3.weight"], atol=1e-5)


def make_mixed_store(folder: Path, modalities: tuple[Modality, ...], targets: Sequence[int] = ()) -> None:
    """Eight patients of each modality, those numbered in `targets` with the size of their ball as target. CTs are
    bright on dark and MRs the reverse; X-rays are projections along y.
    """
    source = np.random.default_rng(0)
    grid = np.indices((SIDE,) * 3)
    number = 0
    for modality in modalities:
        for patient in range(8):
            target = patient % 2
            centre = source.integers(10, 22, 3)
            ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < (36 if target else 80)
            array = 1000 * (ball if modality != "mr" else ~ball) + source.normal(-500, 50, ball.shape)
            if modality == "xray":
                array = array.mean(axis=1, keepdims=True).transpose(0, 2, 1)
            array = array.astype(np.int16)[None]
            known = target if number in targets else None
            meta = VolumeMeta(
                volume=f"v{number:02}", patient=f"p{number}", source=f"v{number}", modality=modality, shape=array.shape,
                spacing_mm=(2.0, 2.0, 2.0), affine=tuple(map(tuple, np.diag([2.0, 2, 2, 1]).tolist())), scale=(1.0,),
                offset=(0.0,), clipped_share=0.0, percentiles=((-600.0, 600.0),),
                foreground_box=((0, array.shape[1]), (0, array.shape[2]), (0, array.shape[3])),
                split={6: "val", 7: "test"}.get(patient, "train"), labelled=known is not None, target=known,
                values=(-800.0, 800.0),
            )  # fmt: skip
            write_volume(folder, array, meta)
            number += 1
    write_json(folder / "audit.json", {"label_names": {}, "sample": False})


def sizes(dims: int) -> list[str]:
    settings = [
        *TINY, f"data.patch_size={[16] * dims}", f"method.views.local_size={[8] * dims}", "method.views.local_views=1",
        "method.prototypes.count=5", "method.hidden=16", "method.dim=8", "method.queue=16", "method.queue_start=2",
    ]  # fmt: skip
    return [part for setting in settings for part in ("--set", setting.replace(" ", ""))]


@pytest.mark.parametrize(
    ("dims", "modalities", "extra"),
    [
        (3, ("ct", "mr"), []),
        (3, ("ct", "mr"), ["method.prototypes.per=shared"]),
        (2, ("ct", "mr", "xray"), []),
        (2, ("ct", "mr", "xray"), ["method.hybrid=true"]),
    ],
)
def test_mixed_stores_train_and_export(
    tmp_path: Path, dims: int, modalities: tuple[Modality, ...], extra: list[str]
) -> None:
    """Of 18 training volumes of the hybrid run 2 have targets, about ten in a hundred."""
    hybrid = "method.hybrid=true" in extra
    make_mixed_store(tmp_path / "store", modalities, (0, 9, 6) if hybrid else ())
    more = [part for setting in extra for part in ("--set", setting)]
    at = ["--workspace", str(tmp_path), "--device", "cpu"]
    how = ["--dim", f"{dims}d", "--method", "online_clustering", "--run", "mixed", "--steps", "6"]
    cli.main(["train", *at, *how, *sizes(dims), *more])
    rows = read_metrics(tmp_path / "runs" / "mixed", "val")
    wanted = {f"{figure}_{name}" for figure in ("code_entropy", "prototype_usage") for name in modalities}
    assert all(wanted <= set(row) for row in rows)
    assert rows[-1]["loss"] > 0
    assert ("target_accuracy" in rows[-1]) == hybrid
    train = read_metrics(tmp_path / "runs" / "mixed", "train")
    assert {"clustering", "swapped", "code_entropy", "prototype_usage"} <= set(train[-1])
    assert ("supervised" in train[-1]) == hybrid
    assert (tmp_path / "runs" / "mixed" / "figures" / "views.png").is_file()
    assert read_json(tmp_path / "runs" / "mixed" / "run.json")["trained"] == ["encoder"]
    cli.main(["export", *at])
    assert read_card(tmp_path / "weights" / "mixed").data.modality == modalities
