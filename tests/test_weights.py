"""A package's weights arrive, or one is told why not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import FlexibleUNet, UNet
from torch import nn

from genesis import load_into, load_pretrained
from genesis.errors import UserError
from genesis.models import Backbone, PublishedUNet, build_backbone, wrap
from genesis.weights import (
    Card,
    CohortCard,
    DataCard,
    PretrainingCard,
    TaskCard,
    find_package,
    read_card,
    write_package,
)
from genesis.workspace import Workspace

UNET: dict[str, Any] = dict(spatial_dims=3, channels=(4, 8, 16), strides=(2, 2), num_res_units=2)
DATA = DataCard(modality="ct", window_hu=(-1000, 1000), spacing_mm=(1, 1, 2.5), patch_size=(16, 16, 8))
PRETRAINING = PretrainingCard(
    method="semantic_genesis",
    steps=1200,
    seed=3,
    metrics={"rec": 0.01, "accuracy": None},
    cohort=CohortCard(patients=("a1", "b2"), volumes=("a1-0", "b2-0", "b2-1")),
)


def unet(seed: int = 1, **changes: Any) -> UNet:
    torch.manual_seed(seed)
    return UNet(**{"in_channels": 1, "out_channels": 1, **UNET, **changes})


def write(folder: Path, network: nn.Module, **fields: Any) -> Path:
    write_package(folder, wrap(network), data=DATA, pretraining=PRETRAINING, **fields)
    return folder


@pytest.fixture(scope="module")
def source() -> UNet:
    return unet(seed=0)


@pytest.fixture(scope="module")
def package(source: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("weights") / "first", source)


def compiled(network: nn.Module) -> Any:
    return torch.compile(network, backend="eager")


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_a_package_gives_the_same_network(package: Path, source: UNet) -> None:
    network = load_pretrained(package)
    assert type(network) is UNet
    assert not network.training
    x = torch.rand(1, 1, 16, 16, 8)
    with torch.no_grad():
        assert torch.equal(network(x), source.eval()(x))
    assert sorted(path.name for path in package.iterdir()) == [
        "README.md", "SHA256SUMS", "card.json", "weights.safetensors"]  # fmt: skip


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(name="unet", spatial_dims=2, channels=(4, 8), strides=(2,), num_res_units=0, in_channels=2),
        dict(name="flexible_unet", spatial_dims=2, backbone="resnet18"),
        dict(name="published_unet", spatial_dims=3),
    ],
)
def test_every_network_makes_the_round_trip(kwargs: dict[str, Any], tmp_path: Path) -> None:
    backbone: Backbone = build_backbone(**kwargs)
    network = load_pretrained(write(tmp_path / "package", backbone.network))
    assert type(network) is type(backbone.network)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), backbone.network.parameters(), strict=True))


def test_the_package_loads_strictly_without_genesis(package: Path) -> None:
    code = """
import json, sys
from monai.networks.nets import UNet
from safetensors.torch import load_file
network = UNet(**json.load(open("card.json"))["network"]["kwargs"])
network.load_state_dict(load_file("weights.safetensors"), strict=True)
assert not any(name.partition(".")[0] == "genesis" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=package, check=True, timeout=120)


def test_the_card_says_what_the_package_is(package: Path) -> None:
    tree = json.loads((package / "card.json").read_text(encoding="utf-8"))
    assert tree["schema"] == 1
    assert tree["network"]["class"] == "monai.networks.nets.UNet"
    assert tree["network"]["kwargs"]["channels"] == [4, 8, 16]
    assert tree["trained"] == ["encoder", "decoder"]
    assert tree["data"] == {
        "modality": "ct", "window_hu": [-1000, 1000], "spacing_mm": [1, 1, 2.5], "patch_size": [16, 16, 8],
        "orientation": "RAS", "intensity_range": [0, 1]}  # fmt: skip
    assert tree["pretraining"]["cohort"]["patients"] == ["a1", "b2"]
    assert tree["task"] is None
    card = read_card(package)
    assert card.pretraining == PRETRAINING
    readme = (package / "README.md").read_text(encoding="utf-8")
    for expected in ("semantic_genesis for 1,200 steps", "3 volumes of 2 patients", "1 × 1 × 2.5 mm", "multiples of 4",
                     "-1000 to 1000 HU", "| rec | 0.01 |", "UNet(**json.load"):  # fmt: skip
        assert expected in readme


def test_a_task_names_its_labels(tmp_path: Path) -> None:
    task = TaskCard(type="segmentation", labels={1: "liver", 2: "spleen"})
    write(tmp_path / "model", unet(out_channels=3), task=task)
    assert read_card(tmp_path / "model").task == task
    assert "liver (1), spleen (2)" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_the_same_network_gets_all_weights(package: Path, source: UNet, capsys: pytest.CaptureFixture[str]) -> None:
    network = unet()
    report = load_into(network, package)
    assert report.share == 1
    assert report.output == "loaded"
    assert not any((report.adapted, report.unexpected, report.missing, report.settings))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), source.parameters(), strict=True))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert "Loaded 100.0% of the trained weights" in printed
    load_into(network, package, quiet=True)
    assert capsys.readouterr().out == ""


def test_other_outputs_keep_the_networks_own_output_layer(package: Path, source: UNet) -> None:
    network = unet(out_channels=5)
    before = snapshot(network)
    report = load_into(network, package, quiet=True)
    assert report.share == 1
    assert report.output == "left as it was, the package's does not fit (model.2.0.conv.weight)"
    state, other = network.state_dict(), source.state_dict()
    output = {*read_card(package).keys.output}
    for key in state:
        assert torch.equal(state[key], before[key] if key in output else other[key]), key


@pytest.mark.parametrize("channels", [2, 4])
def test_other_inputs_keep_the_response(package: Path, source: UNet, channels: int) -> None:
    network = unet(in_channels=channels)
    report = load_into(network, package, quiet=True)
    assert report.share == 1
    assert report.adapted == {
        key: f"1 → {channels} input channels" for key in ("model.0.conv.unit0.conv.weight", "model.0.residual.weight")
    }
    x = torch.rand(1, 1, 16, 16, 8)
    with torch.no_grad():
        expected = source.eval()(x)
        assert torch.allclose(network.eval()(x.expand(-1, channels, -1, -1, -1)), expected, atol=1e-4)


def test_fewer_inputs_keep_the_response(tmp_path: Path) -> None:
    four = unet(in_channels=4)
    network = unet(in_channels=1)
    load_into(network, write(tmp_path / "four", four), quiet=True)
    x = torch.rand(1, 1, 16, 16, 8)
    with torch.no_grad():
        assert torch.allclose(network.eval()(x), four.eval()(x.expand(-1, 4, -1, -1, -1)), atol=1e-4)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, compiled, lambda network: compiled(nn.DataParallel(network))])
def test_wrapped_networks_are_loaded_too(package: Path, source: UNet, wrapper: Any) -> None:
    network = unet()
    assert load_into(wrapper(network), package, quiet=True).share == 1
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), source.parameters(), strict=True))


def test_a_partial_match_is_reported(package: Path, source: UNet) -> None:
    """With one residual unit more per block, all of the package is loaded, and what is new is named."""
    network = unet(num_res_units=3)
    report = load_into(network, package, quiet=True)
    assert report.share == 1
    assert any("unit2" in key for key in report.missing)
    assert report.settings == ("num_res_units: 2 in the package, 3 in the network",)

    network = unet(act="relu")  # has no slopes to learn
    report = load_into(network, package, quiet=True)
    assert 0.99 < report.share < 1
    assert report.unexpected["model.0.conv.unit0.adn.A.weight"] == "the network has no such weight"
    assert "Loaded 99.9% of" in str(report)
    assert "not loaded: model.0.conv.unit0.adn.A.weight" in str(report)


def test_what_is_not_trained_is_not_loaded(tmp_path: Path) -> None:
    network = unet()
    before = snapshot(network)
    source = unet(seed=0)
    folder = write(tmp_path / "encoder", source, trained=("encoder",))
    report = load_into(network, folder, quiet=True)
    keys = read_card(folder).keys
    assert report.share == 1
    assert set(report.matched) == set(keys.encoder)
    assert set(report.missing) == set(keys.decoder)
    assert report.output == "left as it was, the package's is not trained"
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in (*keys.decoder, *keys.output))


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (lambda: unet(channels=(8, 16, 32)), r"only 0% .* channels: \[4, 8, 16\] in the package, \[8, 16, 32\] in the"),
        (lambda: unet(channels=(4, 8, 32)), r"only \d\d% of its trained weights"),
        (lambda: unet(spatial_dims=2), "spatial_dims: 3 in the package, 2 in the network"),
        (PublishedUNet, "do not fit a PublishedUNet: pass a UNet, or take the network that genesis.load_pretrained"),
        (lambda: wrap(unet()), "do not fit a UNetBackbone: pass a UNet"),
        (lambda: nn.Linear(1, 1), "do not fit a Linear"),
    ],
)
def test_weights_of_another_network_are_refused(package: Path, network: Any, match: str) -> None:
    other = network()
    before = snapshot(other)
    with pytest.raises(UserError, match=match):
        load_into(other, package)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_other_architectures_do_not_go_into_a_unet(tmp_path: Path) -> None:
    flexible = write(tmp_path / "flexible", FlexibleUNet(1, 1, "resnet18", spatial_dims=2, pretrained=False))
    with pytest.raises(
        UserError, match=r"holds weights of a monai\.networks\.nets\.FlexibleUNet, which do not fit a UN"
    ):
        load_into(unet(spatial_dims=2), flexible)


def edit(package: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the package with other top-level entries in its card."""
    folder.mkdir()
    for file in package.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    (folder / "card.json").write_text(json.dumps(card | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema": 2}, "newer genesis"),
        ({"trained": "all"}, "not a valid card: trained"),
        ({"extra": 1}, "not a valid card: extra"),
        ({"network": {"class": "os.system", "kwargs": {"command": "true"}}}, r"os\.system is not one of"),
        ({"network": {"class": "monai.networks.nets.UNet", "kwargs": {"spatial_dims": 3}}}, "do not fit monai"),
        ({"network": {"class": "monai.networks.nets.UNet", "kwargs": {
            **UNET, "in_channels": 1, "out_channels": 2}}}, "size mismatch"),
        ({"network": {"class": "monai.networks.nets.UNet", "kwargs": {
            **UNET, "in_channels": 1, "out_channels": 1, "adn_ordering": "AND"}}}, "gives other outputs"),
        ({"keys": {"encoder": [], "decoder": [], "output": []}}, "names other weights"),
    ],
)  # fmt: skip
def test_a_wrong_card_is_refused(package: Path, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        load_pretrained(edit(package, tmp_path / "edited", **changes))


def test_the_readme_may_be_edited(package: Path, tmp_path: Path) -> None:
    folder = edit(package, tmp_path / "edited")
    (folder / "README.md").write_text("my weights", encoding="utf-8")
    load_pretrained(folder)


def test_damage_is_noticed(package: Path, tmp_path: Path) -> None:
    folder = edit(package, tmp_path / "damaged")
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    for load in (load_pretrained, lambda path: load_into(unet(), path)):
        with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
            load(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged or missing"):
        load_pretrained(folder)
    (folder / "card.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"card\.json cannot be read as JSON"):
        load_pretrained(folder)
    with pytest.raises(UserError, match=r"no weights package at .*nowhere"):
        load_into(unet(), tmp_path / "nowhere")


def test_diverged_weights_replace_nothing(tmp_path: Path, source: UNet) -> None:
    folder = write(tmp_path / "package", source)
    broken = unet()
    nn.init.constant_(next(broken.parameters()), float("nan"))
    with pytest.raises(UserError, match="the training has diverged"):
        write(folder, broken)
    load_pretrained(folder)


def test_packages_are_found_by_name_and_by_folder(package: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.weights.mkdir()
    edit(package, workspace.weights / "mine")
    assert find_package("mine", workspace) == workspace.weights / "mine"
    assert find_package(str(package), workspace) == package
    with pytest.raises(UserError, match=r"no weights package 'other'.*there: mine"):
        find_package("other", workspace)


def test_a_card_reads_back_as_it_was_written(package: Path) -> None:
    card = read_card(package)
    assert Card.model_validate_json(card.model_dump_json(by_alias=True)) == card
