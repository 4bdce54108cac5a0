"""Weights divided among two processes learn what whole ones learn, and are saved as whole ones are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from launched import torchrun
from test_step import SIDES, method_and_batch, network
from test_train import ARGUMENTS, DATA, make_discovery, make_store
from torch import Tensor
from torch.utils.data import Dataset

from genesis import cli, load_pretrained
from genesis.engine.checkpoint import read_checkpoint
from genesis.engine.launch import launch
from genesis.engine.method import Batch, Method, Output
from genesis.engine.optimizer import OptimizerSettings
from genesis.engine.sharding import local
from genesis.engine.step import StepSettings, TrainingStep
from genesis.engine.trainer import fit
from genesis.errors import UserError
from genesis.models import Backbone
from genesis.seeding import generator

# Before instance norm: their gradient is 0 but for rounding, which Adam turns into steps, and they change no output.
NO_EFFECT = ("unit0.conv.bias", "model.2.0.conv.bias", "head.convolution.bias")
SGD = OptimizerSettings("sgd", 0.05, clip_norm=1.0)
ADAM = OptimizerSettings("adam", 1e-3, clip_norm=0.1)
STEPS = 4
SHARDED = StepSettings(shard=True)


class Plain(Method):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: Batch) -> Output:
        restored = self.backbone.decode(self.backbone.encode(batch["image"]))
        return Output({"mse": (restored - batch["image"]).square().mean()})


class Patches(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 10**9) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.rand(1, 16, 16, 16, generator=generator(0, "patch", index))
        return {"image": image, "label": torch.tensor(index % 3), "key": torch.tensor(index)}


def train(
    folder: Path,
    settings: StepSettings = StepSettings(),  # noqa: B008
    steps: int = STEPS,
    optimizer: OptimizerSettings = ADAM,
    **how: Any,
) -> Method:
    """Adam, whose second moments are part of what is resumed; the network has instance norm."""
    method, _ = method_and_batch()
    fit(
        method, Patches(), validation=Patches(3), folder=folder, seed=0, device="cpu", steps=steps, batch_size=4,
        optimizer=optimizer, settings=settings, title="test", validate_every=2, workers=0, **how,
    )  # fmt: skip
    return method


def in_two_processes(tmp_path: Path, body: str) -> str:
    script = tmp_path / "script.py"
    head = f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script.write_text(f"{head}from test_sharding import *\nhere = Path({str(tmp_path)!r})\n{body}", encoding="utf-8")
    ((code, said),) = torchrun(str(script))
    assert code == 0, said
    return said


def check_the_memory() -> None:
    """In each of two processes: half of every weight, gradient and moment."""
    method, batch = method_and_batch()
    total = sum(weight.numel() for weight in method.parameters())
    step = TrainingStep(launch("cpu"), method, ADAM, SHARDED, batch_size=12, steps=1, seed=0)
    held: list[int] = []
    step._method.register_forward_pre_hook(lambda *_: held.append(1))
    step(batch, 0)
    assert held, "it is not the divided copy that learns"
    weights = sum(local(weight).numel() for weight in step._method.parameters())
    moments = [local(values["exp_avg"]).numel() for values in step.optimizer.state.values()]
    assert 0.4 * total < weights < 0.6 * total
    assert sum(moments) == weights


def check_a_bad_step() -> None:
    """One process' batch is not finite: no process changes anything."""
    fabric = launch("cpu")
    method, batch = method_and_batch()
    step = TrainingStep(fabric, method, ADAM, SHARDED, batch_size=12, steps=4, seed=0)
    step(batch, 0)
    before = {name: tensor.clone() for name, tensor in step.state_dict()["method"].items()}
    step({**batch, "corrupted": batch["corrupted"] * (torch.nan if fabric.global_rank == 1 else 1)}, 1)
    assert step.skipped.tolist() == [1, 1]
    after = step.state_dict()["method"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def check_every_network() -> None:
    """Divided or not, two processes learn the same; activations are recomputed, too."""
    fabric = launch("cpu")
    for name, sides in SIDES.items():
        ends = []
        for settings in (StepSettings(), SHARDED):
            backbone = network(name)
            start = [weight.detach().clone() for weight in backbone.parameters()]
            backbone.recompute_activations()
            method = Plain(backbone)
            step = TrainingStep(fabric, method, SGD, settings, batch_size=4, steps=2, seed=0)
            image = torch.rand(2, 1, *sides, generator=generator(0, "image", fabric.global_rank))
            for number in range(2):
                step({"image": image, "key": torch.arange(2)}, number)
            step.gather()
            ends.append([weight.detach().clone() for weight in method.parameters()])
        assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*ends, strict=True)), name
        assert max((a - b).abs().max() for a, b in zip(start, ends[1], strict=True)) > 1e-3, name


def check_the_refusal() -> None:
    from test_contrastive_methods import tiny

    with pytest.raises(UserError, match="MoCoV2 changes weights between"):
        TrainingStep(launch("cpu"), tiny("moco_v2"), ADAM, SHARDED, batch_size=4, steps=1, seed=0)
    with pytest.raises(UserError, match=r"train\.compile"):
        settings = StepSettings(shard=True, compile=True)
        TrainingStep(launch("cpu"), method_and_batch()[0], ADAM, settings, batch_size=4, steps=1, seed=0)


def assert_same(one: Path, two: Path, without: tuple[str, ...] = ()) -> None:
    """Weights and optimizer state, whole ones of the same shapes, in the last checkpoint; weights in the best.

    But for the values of weights whose names end as in `without`.
    """
    first, second = (read_checkpoint(folder / "checkpoints" / "last.pt") for folder in (one, two))
    assert first["method"].keys() == second["method"].keys()
    groups = [[{**group, "fused": None} for group in x["optimizer"]["param_groups"]] for x in (first, second)]
    assert groups[0] == groups[1]
    moments = (torch.utils._pytree.tree_leaves(x["optimizer"]["state"]) for x in (first, second))
    assert all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*moments, strict=True))
    best = [read_checkpoint(folder / "checkpoints" / "best.pt") for folder in (one, two)]
    assert best[0]["step"] == best[1]["step"]
    for a, b in ((first["method"], second["method"]), (best[0]["method"], best[1]["method"])):
        for name in a:
            assert a[name].shape == b[name].shape
            assert name.endswith(without) or torch.allclose(a[name], b[name], rtol=0, atol=1e-5), name


@pytest.mark.slow
def test_two_processes_with_divided_weights_equal_one(tmp_path: Path) -> None:
    method = train(tmp_path / "one")
    start = dict(method_and_batch()[0].named_parameters())
    assert max((weight - start[name]).abs().max() for name, weight in method.named_parameters()) > 1e-3
    train(tmp_path / "sgd", optimizer=SGD)
    train(tmp_path / "half", steps=2)  # to go on from, divided
    train(tmp_path / "sgd_half", steps=2, optimizer=SGD)
    in_two_processes(
        tmp_path,
        "check_the_memory()\ncheck_a_bad_step()\ncheck_every_network()\ncheck_the_refusal()\n"
        "method = train(here / 'two', SHARDED)\n"
        "launch('cpu').barrier()\n"  # the first process has written
        "last = read_checkpoint(here / 'two/checkpoints/last.pt')['method']\n"
        "assert all(torch.equal(value, last[name]) for name, value in method.state_dict().items())\n"
        "train(here / 'parts', StepSettings(shard=True, accumulate=2))\n"
        "train(here / 'sgd_two', SHARDED, optimizer=SGD)\n"
        "train(here / 'half', SHARDED, resume=True)\n"
        "train(here / 'sgd_half', SHARDED, optimizer=SGD, resume=True)\n"
        "train(here / 'divided', SHARDED, steps=2)\n"
        "train(here / 'sgd_divided', SHARDED, optimizer=SGD, steps=2)\n",
    )
    train(tmp_path / "divided", resume=True)  # by one process what two began
    for name in ("two", "parts", "half", "divided"):
        assert_same(tmp_path / "one", tmp_path / name, NO_EFFECT)
    train(tmp_path / "sgd_divided", optimizer=SGD, resume=True)
    for name in ("sgd_two", "sgd_half", "sgd_divided"):
        assert_same(tmp_path / "sgd", tmp_path / name)


def test_one_process_is_told_that_there_is_nothing_to_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, SHARDED, steps=1)
    assert "train.shard has no effect" in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_divided_training_saved_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "store")
    make_discovery(tmp_path / "discovery" / "3d", DATA)
    settings = [*ARGUMENTS, "--set", "train.shard=true", "--steps", "2", "--workspace", str(tmp_path)]
    ((code, said),) = torchrun("-m", "genesis.train", "--", "--device", "cpu", *settings)
    assert code == 0, said
    cli.main(["export", "--workspace", str(tmp_path)])
    best = read_checkpoint(tmp_path / "runs" / "semantic_genesis_3d" / "checkpoints" / "best.pt")["method"]
    network = load_pretrained(tmp_path / "weights" / "semantic_genesis_3d").state_dict()
    assert all(torch.equal(value, best[f"backbone.network.{name}"]) for name, value in network.items())
