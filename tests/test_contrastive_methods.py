"""SimCLR and MoCo v2: gradients, queue and teacher, batches in parts, two processes, and what they report."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import torchrun
from test_semantic_genesis import patches
from test_train import make_store, train
from torch import Tensor, nn
from torch.utils.data import Dataset

from genesis.config import load_config
from genesis.engine.checkpoint import read_checkpoint
from genesis.engine.gathering import gathered
from genesis.engine.launch import launch
from genesis.engine.memory import bytes_kept
from genesis.engine.method import Batch
from genesis.engine.monitor import read_metrics
from genesis.engine.optimizer import OptimizerSettings
from genesis.engine.step import StepSettings, TrainingStep
from genesis.engine.trainer import fit
from genesis.errors import UserError
from genesis.files import read_json
from genesis.losses.contrastive import info_nce, nt_xent
from genesis.methods import METHODS, Facts
from genesis.methods.contrast import ContrastiveMethod
from genesis.methods.moco_v2 import MoCoV2
from genesis.methods.simclr import SimCLR
from genesis.models import build_backbone
from genesis.transforms import IntensityRange, MultiCrop

KINDS = {"simclr": SimCLR, "moco_v2": MoCoV2}
both = pytest.mark.parametrize("name", KINDS)


def regions(count: int, dims: int = 3, first: int = 0) -> Batch:
    return {**patches(count, (24,) * dims, first=first), "modality": torch.zeros(count, dtype=torch.long)}


def tiny(name: str, dims: int = 3, **settings: Any) -> Any:
    torch.manual_seed(0)
    backbone = build_backbone("unet", spatial_dims=dims, channels=(4, 8), strides=(2,), num_res_units=1)
    views = MultiCrop((16,) * dims, intensity=(IntensityRange(0.2, 0.1, 0.05, 0.1, 0.02, 0.5),))
    more = {"queue": 10, "momentum": 0.9} if name == "moco_v2" else {}
    return KINDS[name](backbone, views, **{"hidden": 16, "dim": 8, **more, **settings}).train()


def gradients(method: ContrastiveMethod, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    method.zero_grad()
    loss = method(method.prepare(batch)).losses["contrast"]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the length of the gradient."""
    one, other = (torch.cat([each[key].flatten() for key in expected]) for each in (found, expected))
    return float((one - other).norm() / other.norm())


@both
@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_reach_the_encoder_and_the_head_alone(name: str, dims: int) -> None:
    method = tiny(name, dims)
    loss, found = gradients(method, regions(4, dims))
    assert math.isfinite(loss)
    encoder = {f"backbone.network.{key}" for key in method.backbone.encoder_keys}
    assert set(found) == {key for key, _ in method.named_parameters() if key in encoder or key.startswith("head.")}
    assert all(gradient.abs().sum() > 0 for key, gradient in found.items() if not key.endswith("bias"))
    assert {p for p in method.parameters() if p.requires_grad} == {p for p in method.parameters() if p.grad is not None}


@both
def test_the_loss_is_that_of_the_views(name: str) -> None:
    method = tiny(name)
    batch = method.prepare(regions(4))
    first, second = batch["views"].unbind(1)
    with torch.no_grad():
        embedded, features = method.embed(batch)
        bottleneck = method.backbone.encode(first)[-1]
        query = method.head(bottleneck.flatten(2).mean(2))
        if name == "simclr":
            key = method.head(method.backbone.encode(second)[-1].flatten(2).mean(2))
            expected = nt_xent(torch.stack((query, key), dim=1), 0.1)
        else:
            encoder, head = method.teacher
            key = head(encoder(second)[-1].flatten(2).mean(2))
            expected = info_nce(query, key, method.queue, 0.2)
        output = method(batch)
    torch.testing.assert_close(embedded, torch.stack((query, key), dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(features, bottleneck.flatten(2).mean(2))
    assert output.losses["contrast"].item() == pytest.approx(expected.loss.item(), abs=1e-6)


@both
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_whole_batch(name: str, parts: int) -> None:
    batch = regions(8)
    (loss, whole), (again, divided) = (gradients(tiny(name, parts=count), batch) for count in (1, parts))
    assert again == pytest.approx(loss, abs=1e-6)
    assert whole.keys() == divided.keys()
    assert distance(divided, whole) < 1e-4
    accumulated = [
        gradients(tiny(name), {key: values[first : first + 8 // parts] for key, values in batch.items()})[1]
        for first in range(0, 8, 8 // parts)
    ]
    mean = {key: torch.stack([part[key] for part in accumulated]).mean(0) for key in whole}
    if name == "simclr":
        assert distance(mean, whole) > 0.05  # plain accumulation adds no negatives
    else:
        assert distance(mean, whole) < 1e-4  # the negatives are the queue


def test_parts_bound_what_is_kept_for_the_backward_pass() -> None:
    batch = tiny("simclr").prepare(regions(8))
    kept = {parts: bytes_kept(lambda parts=parts: tiny("simclr", parts=parts)(batch)) for parts in (1, 4)}  # type: ignore[misc]
    assert kept[4] < kept[1] / 10


def test_negatives_are_the_whole_batch() -> None:
    method = tiny("simclr", parts=4)
    embedded = method._in_parts(method.prepare(regions(8)))[0]
    assert method.compare(embedded).logits.shape == (16, 16)


# The queue and the teacher


def step(method: MoCoV2, batch: Batch, number: int = 0) -> Tensor:
    """One training step without an optimizer; the keys."""
    method(method.prepare(batch))
    assert method._keys is not None
    keys = method._keys.clone()
    method.after_optimizer_step(number)
    return keys


def test_new_keys_replace_the_oldest() -> None:
    """Ten places, four keys a step: the queue is a ring, whether or not a batch fits its end."""
    method = tiny("moco_v2", momentum=0.5)
    oldest_first = list(method.queue.clone())
    for number in range(7):
        batch = regions(4, first=4 * number)
        before = method.queue.clone()
        keys = step(method, batch)
        oldest_first = [*oldest_first, *keys][-10:]
        place = int(method.place)
        assert place == 4 * (number + 1) % 10
        assert torch.equal(torch.roll(method.queue, -place, 0), torch.stack(oldest_first))
        assert (before != method.queue).any(1).sum() == 4
    assert torch.allclose(method.queue.norm(dim=1), torch.ones(10))


def test_a_batch_larger_than_the_queue_leaves_its_last_keys() -> None:
    method = tiny("moco_v2", queue=3)
    keys = step(method, regions(5))
    assert torch.equal(method.queue, keys[-3:])


def test_the_teacher_follows_and_gets_no_gradient() -> None:
    method = tiny("moco_v2", momentum=0.9)
    students = [*method.backbone.encoder.parameters(), *method.head.parameters()]
    teachers = [*method.teacher.parameters()]
    assert all(map(torch.equal, students, teachers))
    gradients(method, regions(4))
    assert all(weight.grad is None and not weight.requires_grad for weight in teachers)
    with torch.no_grad():
        for weight in students:
            weight.add_(1)
    before = [weight.clone() for weight in teachers]
    method.after_optimizer_step(0)
    for old, new, student in zip(before, teachers, students, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)
    shared = {id(weight) for weight in students}
    assert not shared & {id(weight) for weight in teachers}
    assert not any("up" in key for key in method.teacher.state_dict())


def test_no_gradient_flows_into_keys() -> None:
    method = tiny("moco_v2")
    embedded = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=2).requires_grad_()
    method.compare(embedded).loss.backward()
    assert embedded.grad is not None
    assert embedded.grad[:, 0].abs().sum() > 0
    assert not embedded.grad[:, 1].any()


def test_validation_leaves_queue_and_teacher_alone() -> None:
    method = tiny("moco_v2").eval()
    before = {key: values.clone() for key, values in method.state_dict().items()}
    method.validate([method.prepare(regions(4))])
    assert method._keys is None
    assert all(torch.equal(before[key], values) for key, values in method.state_dict().items())


def test_recomputed_activations_reach_the_teacher_too() -> None:
    torch.manual_seed(0)
    plain = tiny("moco_v2")
    torch.manual_seed(0)
    backbone = build_backbone("unet", spatial_dims=3, channels=(4, 8), strides=(2,), num_res_units=1)
    backbone.recompute_activations()
    saving = MoCoV2(backbone, plain.views, hidden=16, dim=8, queue=10, momentum=0.9).train()
    saving.load_state_dict(plain.state_dict())
    (loss, expected), (again, found) = (gradients(method, regions(4)) for method in (plain, saving))
    assert again == pytest.approx(loss, abs=1e-6)
    assert distance(found, expected) < 1e-4
    step(saving, regions(4))
    weight = next(saving.teacher.parameters())
    with torch.no_grad():
        next(backbone.encoder.parameters()).add_(1)
    before = weight.clone()
    step(saving, regions(4))
    assert not torch.equal(before, weight)


# What is reported


@both
def test_figures_of_held_out_samples(name: str) -> None:
    method = tiny(name).eval()
    batches = [regions(4), regions(3, first=4)]
    figures = method.validate(map(method.prepare, batches))
    whole = method.validate([method.prepare(regions(7))])
    assert figures == pytest.approx(whole, abs=1e-5)
    assert figures["pretext_chance"] == pytest.approx(1 / 13 if name == "simclr" else 1 / 7)
    assert 0 <= figures["pretext_accuracy"] <= 1
    assert not method.collapsed(figures)
    assert any(f"{figures['pretext_accuracy']:.1%}" in line for line in method.told(figures))
    assert set(method.train()(method.prepare(regions(4))).metrics) == {"pretext_accuracy", "alignment", "uniformity"}


@both
def test_a_constant_embedding_is_called_collapsed(name: str) -> None:
    method = tiny(name).eval()
    with torch.no_grad():
        for head in (method.head, method.teacher[1]) if name == "moco_v2" else (method.head,):
            last = head.layers[-1]
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.fill_(1)
        if name == "moco_v2":
            method.queue.fill_(1 / math.sqrt(8))
        for weight in method.backbone.encoder.parameters():
            weight.zero_()
    figures = method.validate([method.prepare(regions(5))])
    assert figures["alignment"] == pytest.approx(0, abs=1e-6)
    complaints = " ".join(method.collapsed(figures))
    for words in ("at chance", "almost the same", "on one line"):
        assert words in complaints


@both
def test_pictures_show_the_region_and_its_views(name: str) -> None:
    method = tiny(name)
    pictures = method.pictures(method.prepare(regions(3)))
    assert list(pictures["views"]) == ["region", "view 1", "view 2"]
    assert pictures["views"]["view 1"].shape == (3, 1, 16, 16, 16)


# Configs


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["method.contrast.virtual_batch=20"],
            "method.contrast.virtual_batch is 20: it must be a multiple of train.batch",
        ),
        (["method.contrast.virtual_batch=16"], "must be a multiple of train.batch_size, 32"),
        (["method.contrast.virtual_batch=0"], "method.contrast.virtual_batch: Input should be greater than 0"),
        (["train.accumulate=2"], "train.accumulate is 2, .* method.contrast.virtual_batch to the samples"),
        (["train.batch_size=1"], "train.batch_size must be at least 2"),
        (["method.views.global_views=3"], "views.global_views must be 2"),
        (["method.contrast.temprature=1"], "unknown key method.contrast.temprature; did you mean temperature?"),
        (["method.views.intensity.ct.gama=1"], "unknown key method.views.intensity.ct.gama; did you mean gamma?"),
        (["method.queue=1"], "unknown key method.queue; known here: views, contrast, name"),
        (["method.contrast.temperature=-1"], r"method.contrast.temperature: Input .* \(got -1\)"),
        (["method.views.source=0.5"], "method.views.source: Input should be greater than or equal to 1"),
        (["method.views.flip=[w]"], "method.views.flip.0: expected 'x', 'y' or 'z'"),
        (["method.name=simcrl"], r"method.name: expected .*'simclr'.* \(got 'simcrl'\)"),
        (["method={}"], "method.name is missing"),
        (["method=3"], "method: is a section, not a value"),
        (["method.views.local_size=[8,8]"], "method.views.local_size has 2 numbers; a 3D config needs 3"),
    ],
)
def test_mistakes_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("simclr_3d", overrides)


def test_a_flip_along_an_axis_that_there_is_not() -> None:
    with pytest.raises(UserError, match=r"method\.views\.flip has z"):
        load_config("simclr_2d", ["method.views.flip=[z]"])


def test_batch_norm_is_not_divided() -> None:
    network = "network={name: flexible_unet, backbone: resnet18}"
    config = load_config("simclr_2d", [network, "method.contrast.virtual_batch=512"])
    backbone = build_backbone(spatial_dims=2, **config.network.model_dump())
    with pytest.raises(UserError, match="the network flexible_unet has batch norm"):
        METHODS["simclr"](config, backbone, Facts())


def test_a_virtual_batch_trains_from_the_store(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    settings = ["--set", "data.patch_size=[16,16,16]", "--set", "data.spacing_mm=median"]
    virtual = ["--set", "train.batch_size=2", "--set", "method.contrast.virtual_batch=4"]
    for name, more in (("divided", virtual), ("whole", [])):
        train(tmp_path, "--method", "simclr", "--run", name, "--steps", "2", *settings, *more)
    first, second = (read_metrics(tmp_path / "runs" / name, "train")[-1] for name in ("divided", "whole"))
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)
    assert read_json(tmp_path / "runs" / "divided" / "run.json")["trained"] == ["encoder"]
    assert (tmp_path / "runs" / "whole" / "figures" / "views.png").is_file()


# Several processes


class Regions(Dataset[Batch]):
    def __getitem__(self, index: int) -> Batch:
        return {key: values[0] for key, values in regions(1, 2, first=index).items()}


def trained(folder: Path, name: str, parts: int = 1, steps: int = 6) -> None:
    """With SGD, to which the scale of a gradient matters."""
    method = tiny(name, 2, parts=parts)
    fit(
        method, Regions(), validation=None, folder=folder, seed=0, device="cpu", steps=steps, batch_size=8,
        optimizer=OptimizerSettings("sgd", 0.1), title="test", validate_every=3, workers=0,
    )  # fmt: skip


TWO_RANKS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_contrastive_methods import trained
for name in ("simclr", "moco_v2"):
    for parts in (1, 2):
        trained(Path({folder!r}) / f"{{name}}{{parts}}", name, parts)
    trained(Path({folder!r}) / f"{{name}}_step", name, steps=1)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    two = tmp_path / "two"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(two)), encoding="utf-8")
    for code, said in torchrun(str(script)):
        assert code == 0, said
    for name in KINDS:
        trained(tmp_path / name, name)
        expected = read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["method"]
        for parts in (1, 2):
            found = read_checkpoint(two / f"{name}{parts}" / "checkpoints" / "last.pt")["method"]
            for key, values in expected.items():
                torch.testing.assert_close(found[key], values, atol=1e-5, rtol=0)
            rows = (read_metrics(folder, "train")[-1] for folder in (tmp_path / name, two / f"{name}{parts}"))
            first, second = rows
            assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
        one_step = tmp_path / f"{name}_step"
        trained(one_step, name, steps=1)
        start = {key: values for key, values in tiny(name, 2).named_parameters() if values.requires_grad}
        ends = (
            read_checkpoint(folder / "checkpoints" / "last.pt")["method"] for folder in (one_step, two / f"{name}_step")
        )
        one, other = (torch.cat([(end[key] - start[key]).detach().flatten() for key in start]).double() for end in ends)
        assert float(one @ other / one.norm() / other.norm()) == pytest.approx(1, abs=1e-4)
        assert float(other.norm() / one.norm()) == pytest.approx(1, abs=1e-4)


def test_to_find_what_fits_no_process_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one of them may have run out of memory."""

    class Hungry(SimCLR):
        def embed(self, batch: Batch) -> Any:
            if len(batch["image"]) > 3:
                raise MemoryError
            return super().embed(batch)

    method = tiny("simclr", 2)
    method.__class__ = Hungry
    waits = []

    def wait(x: Tensor) -> tuple[Tensor, int]:
        waits.append(len(x))
        return x, 0

    monkeypatch.setattr("genesis.methods.simclr.gathered", wait)
    step = TrainingStep(
        launch("cpu"), method, OptimizerSettings("sgd", 0.1), StepSettings(), batch_size=8, steps=1, seed=0
    )
    with pytest.raises(UserError, match=r"8 patches at once do not fit .*, 3 do"):
        step(method.prepare(regions(8, 2)), 0)
    assert not waits
    assert method.training


def test_a_single_process_gathers_its_own() -> None:
    x = torch.rand(3, 2, requires_grad=True)
    everyone, first = gathered(x)
    assert everyone is x
    assert first == 0
