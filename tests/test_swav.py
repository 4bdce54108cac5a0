"""SwAV: what it minimises and trains, its queue, its frozen prototypes, and what it says of a collapse."""

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from test_semantic_genesis import patches as waves
from torch import Tensor
from torch.nn import functional

from genesis.data.samplers import NO_TARGET
from genesis.data.store import MODALITIES
from genesis.engine.batch_norm import join_batch_norms
from genesis.engine.method import Batch
from genesis.losses.clustering import sinkhorn, swapped_prediction_loss
from genesis.methods.swav import SwAV
from genesis.models import Backbone, ProjectionHead, Prototypes, build_backbone
from genesis.transforms import IntensityRange, MultiCrop

JITTER = IntensityRange(gamma=0.2, gain=0.1, noise=0.02, blur=0.5)
COUNT, DIM = 6, 16


def patches(count: int, size: Sequence[int], channels: int = 1, first: int = 0) -> Batch:
    """Waves, of which every other is a CT, the rest MR; every tenth has its frequency as target."""
    batch = waves(count, size, channels, first)
    index = torch.arange(first, first + count)
    target = torch.where(index % 10 == 0, batch.pop("label"), NO_TARGET)
    return {**batch, "modality": index % 2, "target": target}


def parts_of(dims: int, channels: int = 1, local_views: int = 2) -> tuple[Backbone, MultiCrop, ProjectionHead]:
    torch.manual_seed(0)
    backbone = build_backbone(
        "unet", spatial_dims=dims, in_channels=channels, out_channels=channels, channels=(8, 16), strides=(2,),
        num_res_units=1,
    )  # fmt: skip
    views = MultiCrop(
        (16,) * dims, local_size=(8,) * dims, local_views=local_views, global_scale=(0.7, 1.0), local_scale=(0.4, 0.6),
        rotation_degrees=5.0, intensity=(JITTER,) * len(MODALITIES),
    )  # fmt: skip
    return backbone, views, ProjectionHead(16, 32, DIM, norm="batch")


def tiny(dims: int = 3, channels: int = 1, **settings: Any) -> SwAV:
    return SwAV(*parts_of(dims, channels), Prototypes(DIM, COUNT), **settings)


def take_steps(method: SwAV, count: int, *, rate: float = 1e-2, batch: int = 8, first: int = 0) -> list[float]:
    optimizer = torch.optim.Adam(method.param_groups(), rate)
    losses = []
    for step in range(first, first + count):
        output = method(method.prepare(patches(batch, (20, 20), first=batch * step)))
        loss = torch.stack(list(output.losses.values())).sum()
        loss.backward()
        method.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        method.after_optimizer_step(step)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_reach_every_trained_parameter(dims: int) -> None:
    method = tiny(dims, 2, queue=12)
    output = method(method.prepare(patches(4, (20,) * dims, channels=2)))
    assert set(output.losses) == {"clustering"}
    assert not any(value.requires_grad for value in output.metrics.values())
    output.losses["clustering"].backward()
    encoder = {f"backbone.network.{key}" for key in method.backbone.encoder_keys}
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad == (name in encoder or not name.startswith("backbone")), name


def test_the_loss_is_the_swapped_prediction_of_the_views() -> None:
    method = tiny().eval()
    batch = method.prepare(patches(6, (20, 20, 20)))
    views = method.pictures(batch)["views"]
    assert list(views) == ["region", "global 1", "global 2", "local 1", "local 2"]
    layers: Any = method.head.layers
    scores = []
    for view in list(views.values())[1:]:
        feature = method.backbone.encode(view)[-1].flatten(2).mean(2)
        first, norm, _, last = layers
        hidden = functional.batch_norm(first(feature), norm.running_mean, norm.running_var, norm.weight, norm.bias)
        z = last(hidden.relu())
        scores.append(functional.normalize(z, dim=1) @ functional.normalize(method.prototypes.weight, dim=1).T)
    codes = torch.stack([sinkhorn(view) for view in scores[:2]])
    expected = swapped_prediction_loss(codes, torch.stack(scores))
    assert method(batch).losses["clustering"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_prototypes_are_frozen_at_first_and_of_unit_length_always() -> None:
    method = tiny(2, frozen_steps=2)
    before = method.prototypes.weight.detach().clone()
    take_steps(method, 2)
    assert torch.allclose(method.prototypes.weight, before, atol=1e-6)
    take_steps(method, 1, first=2)
    assert not torch.allclose(method.prototypes.weight, before, atol=1e-3)
    assert torch.allclose(method.prototypes.weight.norm(dim=1), torch.ones(COUNT))


def test_the_queue_holds_the_latest_embeddings_and_counts_from_its_start_on() -> None:
    method = tiny(2, queue=10, queue_start=2)
    batches = [method.prepare(patches(4, (20, 20), first=4 * step)) for step in range(4)]
    for step, batch in enumerate(batches):
        with torch.no_grad():
            seen = method._see(batch)
            queue, modality = method.queue.clone(), method.queued_modality.clone()
            codes = method._codes(seen, batch["modality"])
        beside = sinkhorn(torch.cat((seen.scores[1], queue[1, : 4 * step] @ method.prototypes.weight.T)))[:4]
        alone = sinkhorn(seen.scores[1])
        assert torch.allclose(codes[1], beside if step >= 2 else alone, atol=1e-5)
        assert step == 0 or not torch.allclose(beside, alone, atol=1e-3)
        assert torch.equal(method.queue, torch.cat((seen.embeddings[:2], queue), dim=1)[:, :10])
        assert torch.equal(method.queued_modality, torch.cat((batch["modality"], modality))[:10])
        method.after_optimizer_step(step)
    before = method.queue.clone()
    method.eval()(batches[0])
    assert torch.equal(method.queue, before)


def test_all_state_is_in_the_state_dict() -> None:
    """Two steps, and three by a method that takes up their state, end where five do."""
    whole, first = (tiny(2, queue=12, queue_start=1, frozen_steps=1) for _ in range(2))
    losses = take_steps(whole, 5, rate=0.0)
    assert take_steps(first, 2, rate=0.0) == losses[:2]
    second = tiny(2, queue=12, queue_start=1, frozen_steps=1)
    second.load_state_dict(first.state_dict())
    assert take_steps(second, 3, rate=0.0, first=2) == losses[2:]


def test_a_batch_equals_its_samples() -> None:
    method = tiny().eval()
    batch = method.prepare(patches(3, (20, 20, 20)))
    alone = [method._see({name: value[i : i + 1] for name, value in batch.items()}) for i in range(3)]
    together = method._see(batch)
    for part, *single in zip(together, *alone, strict=True):
        assert torch.allclose(part, torch.cat(single, dim=1), atol=1e-5)


def test_validation_does_not_depend_on_the_batches() -> None:
    method = tiny(2, queue=8).eval()
    whole = method.prepare(patches(10, (20, 20)))
    figures = method.validate([whole])
    batches = [{name: value[i : i + 3] for name, value in whole.items()} for i in range(0, 10, 3)]
    assert method.validate(batches) == pytest.approx(figures, rel=1e-4)
    assert figures["ln_prototypes"] == math.log(COUNT)
    assert 0 < figures["code_entropy"] <= 1
    assert 0 < figures["prototype_usage"] <= 1
    assert len(method.told(figures)) == 2


def test_it_learns() -> None:
    method = SwAV(*parts_of(2, local_views=0), Prototypes(DIM, COUNT), frozen_steps=5, queue=64, queue_start=150)
    held_out = [method.prepare(patches(60, (20, 20), first=10_000))]
    before = method.eval().validate(held_out)
    take_steps(method.train(), 200, rate=3e-3, batch=32)
    figures = method.eval().validate(held_out)
    assert figures["swapped"] < 0.8 * min(before["swapped"], figures["ln_prototypes"]), figures
    assert figures["agreement"] > 0.5 > 2 / COUNT
    assert figures["code_entropy"] < 0.8
    assert figures["prototype_usage"] > 0.5
    assert method.collapsed(figures) == []


def test_a_collapse_is_told() -> None:
    """All embeddings alike; one prototype that gets all; features on one line."""
    method = tiny(2).eval()
    batch = [method.prepare(patches(10, (20, 20)))]
    with torch.no_grad():
        list(method.head.parameters())[-2].zero_()  # what is left is the bias
    found = method.collapsed(method.validate(batch))
    assert any("codes are uniform" in one for one in found)
    assert any("one prototype gets 100%" in one for one in found)
    with torch.no_grad():
        method.prototypes.weight.copy_(torch.eye(DIM)[:1].expand(COUNT, DIM))
    assert any("no better than a uniform guess (1.79)" in one for one in method.collapsed(method.validate(batch)))
    assert not any("one line" in one for one in found)
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.zero_()
    assert any("one line" in one for one in method.collapsed(method.validate(batch)))


def in_two_processes(target: Any, folder: Path, *arguments: Any) -> None:
    torch.multiprocessing.spawn(_meet, (folder, target, arguments), nprocs=2)


def _meet(rank: int, folder: Path, target: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    target(rank, folder, *arguments)
    torch.distributed.destroy_process_group()


def norm_of_a_process(rank: int, folder: Path, x: Tensor, weights: Tensor) -> None:
    norm, mine = torch.nn.BatchNorm3d(5), x.chunk(2)[rank].clone().requires_grad_()
    join_batch_norms(norm)
    y = norm(mine)
    (y * weights.chunk(2)[rank]).sum().backward()
    unseen = norm.eval()(x)
    torch.save([y.detach(), mine.grad, norm.state_dict(), unseen], folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("spatial", [(), (3, 2, 4)])
def test_joint_batch_norm_over_two_processes_is_that_of_one(tmp_path: Path, spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 8, 5, *(spatial or (1, 1, 1))).unbind()
    in_two_processes(norm_of_a_process, tmp_path, x, weights)
    norm, free = torch.nn.BatchNorm3d(5), x.clone().requires_grad_()
    y = norm(free)
    (y * weights).sum().backward()
    assert free.grad is not None
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for index, expected in enumerate((y, free.grad)):
        assert torch.allclose(torch.cat([part[index] for part in parts]), expected, atol=1e-5)
    for part in parts:
        for name, value in norm.state_dict().items():
            assert torch.allclose(part[2][name], value, atol=1e-6), name
        assert torch.allclose(part[3], norm.eval()(x), atol=1e-5)
