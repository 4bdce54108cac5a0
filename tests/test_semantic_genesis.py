"""Semantic Genesis: what it minimises, what it trains, what it reports."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from genesis.engine.method import Batch
from genesis.evaluation.probes import knn_accuracy
from genesis.losses.restoration import restoration_loss
from genesis.methods.semantic_genesis import SemanticGenesis
from genesis.models import build_backbone
from genesis.seeding import generator, key
from genesis.transforms import Corruption

CLASSES = 3
CORRUPTION = Corruption(flip=0.4, shuffle=0.5, nonlinear=0.9, paint=0.9, outpaint=0.8, paint_fill="voxel")


def patches(count: int, size: Sequence[int], channels: int = 1, first: int = 0) -> Batch:
    """Waves within a bright body on a dark ground; the class is their frequency."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    body = (torch.stack(axes).norm(dim=0) < 0.8).float()
    images = []
    for index in range(first, first + count):
        phase, level = torch.rand(2, generator=generator(0, "patch", index))
        wave = torch.sin(math.pi * ((1 + 2 * (index % CLASSES)) * axes[0] + 2 * phase))
        images.append((body * (0.6 + 0.2 * level + 0.2 * wave)).expand(channels, *size))
    indices = range(first, first + count)
    return {
        "image": torch.stack(images),
        "label": torch.tensor([index % CLASSES for index in indices]),
        "key": torch.tensor([key(0, "key", index) for index in indices]),
    }


def tiny(dims: int = 3, channels: int = 1, **settings: Any) -> SemanticGenesis:
    torch.manual_seed(0)
    backbone = build_backbone(
        "unet", spatial_dims=dims, in_channels=channels, out_channels=channels, channels=(4, 8), strides=(2,),
        num_res_units=1,
    )  # fmt: skip
    return SemanticGenesis(backbone, CLASSES, CORRUPTION, **settings)


def restorations(method: SemanticGenesis, batch: Batch) -> list[Tensor]:
    """Original, corrupted and restored patches."""
    *shown, difference = method.pictures(method.prepare(batch))["restorations"].values()
    assert torch.equal(difference, shown[2] - shown[0])
    return shown


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("classify", ["corrupted", "clean"])
@pytest.mark.parametrize(("lambda_rec", "lambda_cls"), [(1.0, 0.01), (1.0, 0.0), (0.0, 1.0)])
def test_gradients_reach_every_trained_parameter(
    dims: int, classify: Any, lambda_rec: float, lambda_cls: float
) -> None:
    method = tiny(dims, 2, classify=classify, lambda_rec=lambda_rec, lambda_cls=lambda_cls)
    output = method(method.prepare(patches(3, (16,) * dims, channels=2)))
    terms = {"restoration": lambda_rec, "classification": lambda_cls}
    assert set(output.losses) == {name for name, weight in terms.items() if weight}
    torch.stack(list(output.losses.values())).sum().backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    encoder = set(method.backbone.encoder_keys)
    frozen = {name for name, p in method.backbone.network.named_parameters() if not p.requires_grad}
    assert frozen == (set() if lambda_rec else {k for k, _ in method.backbone.network.named_parameters()} - encoder)
    assert hasattr(method, "head") == (lambda_cls > 0)
    assert hasattr(method, "calibration") == (lambda_rec > 0)


def test_a_method_without_a_task_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be learned"):
        tiny(lambda_rec=0, lambda_cls=0)


def test_losses_are_the_published_ones_weighted() -> None:
    method = tiny(lambda_rec=2.0, lambda_cls=0.5).eval()
    batch = patches(4, (16, 16, 8))
    output = method(method.prepare(batch))
    original, corrupted, restored = restorations(method, batch)
    assert not torch.equal(original, corrupted)
    assert output.losses["restoration"].item() == pytest.approx(
        2 * float(((restored - original) ** 2).mean()), rel=1e-5
    )
    logits = method.head(method.backbone.encode(corrupted)[-1])
    cross_entropy = -logits.log_softmax(1)[range(4), batch["label"]].mean()
    assert output.losses["classification"].item() == pytest.approx(0.5 * cross_entropy.item(), rel=1e-5)
    assert output.metrics["mse"].item() == pytest.approx(output.losses["restoration"].item() / 2)
    assert not any(value.requires_grad for value in output.metrics.values())


def test_classify_clean_sees_the_uncorrupted_patch() -> None:
    batch = patches(4, (16, 16, 8))
    other = {**batch, "key": batch["key"] + 1}
    for classify, same in (("clean", True), ("corrupted", False)):
        method = tiny(classify=classify).eval()
        pair = [method(method.prepare(b)).losses["classification"].item() for b in (batch, other)]
        assert (pair[0] == pair[1]) == same


def test_a_batch_equals_its_samples() -> None:
    method = tiny().eval()
    batch = patches(4, (16, 16, 8))
    alone = [restorations(method, {name: value[i : i + 1] for name, value in batch.items()})[2] for i in range(4)]
    assert torch.allclose(restorations(method, batch)[2], torch.cat(alone), atol=1e-5)


def test_validation_is_repeatable_and_independent_of_the_batches() -> None:
    method = tiny().eval()
    whole = patches(10, (16, 16, 8))
    batches = [{name: value[i : i + 3] for name, value in whole.items()} for i in range(0, 10, 3)]
    figures = method.validate([method.prepare(whole)])
    assert figures == method.validate([method.prepare(whole)])
    assert figures == pytest.approx(method.validate(map(method.prepare, batches)), rel=1e-5)

    original, corrupted, restored = restorations(method, whole)
    assert figures["mse"] == pytest.approx(float(((restored - original) ** 2).mean()), rel=1e-5)
    assert figures["input_mse"] == pytest.approx(float(((corrupted - original) ** 2).mean()), rel=1e-5)
    assert figures["mean_mse"] == pytest.approx(np.mean([patch.numpy().var() for patch in original]), rel=1e-4)
    assert figures["chance"] == 0.4  # ten patches of classes 0 1 2 0 1 2 …
    assert figures["loss"] == pytest.approx(figures["mse"] + 0.01 * figures["cross_entropy"], rel=1e-5)


@pytest.mark.parametrize(("switch", "absent"), [("lambda_cls", "accuracy"), ("lambda_rec", "mse")])
def test_validation_leaves_out_the_task_that_is_off(switch: str, absent: str) -> None:
    off: dict[str, Any] = {switch: 0.0}
    method = tiny(**off).eval()
    figures = method.validate([method.prepare(patches(4, (16, 16, 8)))])
    assert absent not in figures
    assert {"loss", "knn_accuracy", "chance"} <= set(figures)


@pytest.mark.parametrize(("classify", "steps", "accuracy"), [("clean", 60, 0.9), ("corrupted", 200, 0.6)])
def test_it_learns_both_tasks(classify: str, steps: int, accuracy: float) -> None:
    method = tiny(classify=classify, lambda_cls=1.0)
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    held_out = patches(30, (16, 16, 8), first=10_000)
    for step in range(steps):
        output = method(method.prepare(patches(12, (16, 16, 8), first=12 * step)))
        torch.stack(list(output.losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    figures = method.eval().validate([method.prepare(held_out)])
    assert figures["mse"] < 0.5 * min(figures["input_mse"], figures["mean_mse"])
    assert figures["accuracy"] > accuracy > 1.5 * figures["chance"], figures
    assert figures["knn_accuracy"] > 0.8


def test_knn_accuracy_is_that_of_a_slow_search() -> None:
    source = generator(0, "features")
    labels = torch.randint(3, (40,), generator=source)
    features = torch.randn(40, 6, generator=source) + 2 * functional.one_hot(labels, 6)
    centred = (features - features.mean(0)).double()
    hits = 0
    for i in range(40):
        similarity = [
            (float(functional.cosine_similarity(centred[i], centred[j], dim=0)), j) for j in range(40) if j != i
        ]
        votes = [0.0, 0.0, 0.0]
        for value, j in sorted(similarity, reverse=True)[:5]:
            votes[int(labels[j])] += 1 + value
        hits += int(np.argmax(votes)) == int(labels[i])
    assert knn_accuracy(features, labels) == pytest.approx(hits / 40)
    assert knn_accuracy(features[:1], labels[:1]) == 0


def test_knn_accuracy_is_exact_under_autocast() -> None:
    """Every direction comes twice; to the next one, 0.02 away, bfloat16 sees no difference."""
    angle = 0.02 * torch.arange(50)
    half = torch.stack([angle.cos(), angle.sin()], dim=1)
    features, labels = torch.cat([half, -half]).repeat(2, 1), torch.arange(100).repeat(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert knn_accuracy(features, labels, neighbours=1) == 1


def test_restoration_loss_gradient() -> None:
    source = generator(0, "loss")
    restored, original = torch.rand(2, 2, 1, 4, 4, generator=source, dtype=torch.float32).unbind(0)
    restored.requires_grad_(True)
    loss = restoration_loss(restored, original)
    loss.backward()
    assert isinstance(restored.grad, Tensor)
    assert torch.allclose(restored.grad, 2 * (restored - original).detach() / original.numel())
