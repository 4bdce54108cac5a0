"""Backbones are the plain networks, with their halves in reach; heads and autoencoder have the promised shapes."""

import copy
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet

from genesis.models import (
    Autoencoder,
    Backbone,
    ClassificationHead,
    Classifier,
    PublishedUNet,
    RestorationCalibration,
    build_backbone,
    build_described,
    wrap,
)

NETWORKS: dict[str, dict[str, Any]] = {
    "unet 3D": dict(name="unet", spatial_dims=3, channels=(4, 8, 16), strides=(2, 2), num_res_units=2),
    "unet 2D": dict(name="unet", spatial_dims=2, in_channels=2, out_channels=3, channels=(4, 8, 16, 32),
                    strides=(2, 1, 2), num_res_units=0),
    "published": dict(name="published_unet", spatial_dims=3),
    "flexible 2D": dict(name="flexible_unet", spatial_dims=2, backbone="resnet18"),
}  # fmt: skip


@pytest.fixture(params=NETWORKS, scope="module")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(**NETWORKS[request.param])


def images(backbone: Backbone, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, backbone.in_channels, *(2 * backbone.stride,) * backbone.spatial_dims)


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_encode_and_decode_are_the_network(backbone: Backbone, training: bool) -> None:
    backbone.train(training)
    x = images(backbone)
    features = backbone.encode(x)
    assert torch.equal(backbone.decode(features), backbone.network(x))
    assert torch.equal(backbone(x), backbone.network(x))
    assert [feature.shape[1] for feature in features] == backbone.feature_channels
    assert features[-1].shape[2:] == (2,) * backbone.spatial_dims


def test_every_key_is_in_one_part(backbone: Backbone) -> None:
    keys = [*backbone.encoder_keys, *backbone.decoder_keys, *backbone.output_keys]
    assert sorted(keys) == sorted(backbone.network.state_dict())
    assert {f"network.{key}" for key in keys} == set(backbone.state_dict())


def test_the_encoder_needs_its_keys_and_no_others(backbone: Backbone) -> None:
    """Gradients of the bottleneck reach the encoder's weights only; those of the output reach all."""
    backbone.train()
    parameters = dict(backbone.network.named_parameters())
    for output, reached in (
        (backbone.encode(images(backbone))[-1], {*backbone.encoder_keys}),
        (backbone(images(backbone)), {*parameters}),
    ):
        gradients = torch.autograd.grad(output.square().sum(), list(parameters.values()), allow_unused=True)
        used = {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        assert used == reached & parameters.keys()


def test_a_copy_has_its_own_weights(backbone: Backbone) -> None:
    copied = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in copied.network.parameters():
            parameter.zero_()
    assert all(not p.any() for p in copied.encoder.parameters())
    assert any(p.any() for p in backbone.encoder.parameters())


def test_a_description_makes_the_same_network(backbone: Backbone) -> None:
    again = build_described(backbone.describe())
    assert again.describe() == backbone.describe()
    again.network.load_state_dict(backbone.network.state_dict())
    other = build_described(backbone.describe(), in_channels=3, logits=5)
    other.eval()
    with torch.no_grad():
        logits = other(100 * images(other, batch=1))
    assert logits.shape[1] == 5
    assert type(wrap(other.network)) is type(other)


def test_the_output_layer_is_what_other_outputs_change(backbone: Backbone) -> None:
    other = build_described(backbone.describe(), logits=backbone.out_channels + 1).network.state_dict()
    own = backbone.network.state_dict()
    changed = {key for key in own if own[key].shape != other[key].shape}
    assert changed
    assert changed <= {*backbone.output_keys}


def test_any_monai_unet_can_be_wrapped() -> None:
    network = UNet(2, 1, 1, (4, 8), (2,), num_res_units=1, norm="batch", act=("leakyrelu", {"negative_slope": 0.2}))
    kwargs = wrap(network).describe()["kwargs"]
    assert kwargs["norm"] == "batch"
    assert kwargs["act"] == ["leakyrelu", {"negative_slope": 0.2}]
    with pytest.raises(ValueError, match="Linear is not one of"):
        wrap(torch.nn.Linear(1, 1))


def test_the_published_network_has_the_published_keys() -> None:
    network = PublishedUNet()
    expected = {f"{block}.ops.{i}.{key}" for i in range(2)
                for block in ("down_tr64", "down_tr128", "down_tr256", "down_tr512", "up_tr256", "up_tr128", "up_tr64")
                for key in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean",
                            "bn1.running_var", "bn1.num_batches_tracked")}  # fmt: skip
    expected |= {f"up_tr{n}.up_conv.{key}" for n in (256, 128, 64) for key in ("weight", "bias")}
    expected |= {"out_tr.final_conv.weight", "out_tr.final_conv.bias"}
    assert set(network.state_dict()) == expected
    assert len(expected) == 106
    assert sum(parameter.numel() for parameter in network.parameters()) == 19_073_665
    assert network.state_dict()["up_tr256.ops.0.conv1.weight"].shape == (256, 768, 3, 3, 3)


@torch.no_grad()
def test_the_published_network_in_eval_mode_does_not_look_at_the_batch() -> None:
    network = PublishedUNet().eval()
    x = torch.rand(2, 1, 8, 8, 16)
    assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-6)
    assert 0 < network(x).min() < network(x).max() < 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(name="resunet"), "'resunet' is unknown"),
        (dict(strides=(2, 2, 2)), "one number fewer"),
        (dict(num_res_units=None), "needs exactly these settings: channels, num_res_units, strides"),
        (dict(backbone="resnet18"), "given are: backbone, channels"),
        (dict(name="published_unet", channels=None, strides=None, num_res_units=None, spatial_dims=2), "3D only"),
        (dict(name="flexible_unet", channels=None, strides=None, num_res_units=None, backbone="vgg"), "a ResNet"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_backbone(**NETWORKS["unet 3D"] | change)


def test_a_description_names_no_other_class() -> None:
    with pytest.raises(ValueError, match=r"os\.system is not one of"):
        build_described({"class": "os.system", "kwargs": {"command": "true"}})
    with pytest.raises(ValueError, match="do not fit"):
        build_described({"class": "monai.networks.nets.UNet", "kwargs": {"spatial_dims": 3, "colour": "red"}})


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_head_does_not_depend_on_the_batch(spatial_dims: int) -> None:
    head = ClassificationHead(8, 5, spatial_dims=spatial_dims)
    x = torch.randn(3, 8, *(2,) * spatial_dims)
    assert head(x).shape == (3, 5)
    assert torch.allclose(head(x)[:1], head(x[:1]), atol=1e-6)
    assert head.convolution.out_channels == 16


def test_calibration_starts_at_the_typical_patch_and_learns_each_patch() -> None:
    torch.manual_seed(0)
    calibration = RestorationCalibration(8, 2, mean=0.4, sd=0.2)
    restored, bottleneck = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 8, 2, 2, 2)
    assert torch.allclose(calibration(restored, bottleneck), 0.4 + 0.2 * restored)
    calibration(restored, bottleneck).square().mean().backward()
    assert calibration.linear.weight.grad is not None
    assert calibration.linear.weight.grad.abs().min() > 0


def test_a_classifier_is_the_encoder_and_a_linear_layer(backbone: Backbone) -> None:
    classifier = Classifier(backbone, 4)
    assert classifier(images(backbone)).shape == (2, 4)
    encoder = {id(parameter) for parameter in backbone.encoder.parameters()}
    assert {id(p) for p in classifier.parameters()} == encoder | {id(p) for p in classifier.linear.parameters()}


@pytest.mark.parametrize("shape", [(16, 16, 8), (17, 13, 9), (20, 31)])
def test_the_autoencoder_gives_back_any_size(shape: tuple[int, ...]) -> None:
    autoencoder = Autoencoder(len(shape), (4, 8, 16), in_channels=2)
    x = torch.rand(2, 2, *shape)
    assert autoencoder(x).shape == x.shape
    assert autoencoder.encode(x).shape == (2, 16)


def test_the_autoencoder_sees_the_image_through_the_bottleneck_only() -> None:
    """Without the bottleneck's values the reconstruction is the same for all images."""
    autoencoder = Autoencoder(2, (4, 8))
    autoencoder.encoder.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    first, second = autoencoder(torch.rand(2, 1, 8, 8))
    assert torch.equal(first, second)


def test_the_autoencoder_learns_and_its_latent_tells_images_apart() -> None:
    torch.manual_seed(0)
    grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    centres, radii = 4 + 8 * torch.rand(16, 2), 2 + 4 * torch.rand(16)
    x = ((grid - centres[..., None, None]).norm(dim=1, keepdim=True) < radii[:, None, None, None]).float()
    autoencoder = Autoencoder(2, (8, 16, 32))
    optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-2)
    for _ in range(100):
        loss = (autoencoder(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * x.var()
    with torch.no_grad():
        noisy = torch.cdist(autoencoder.encode(x + 0.05 * torch.randn_like(x)), autoencoder.encode(x))
    assert torch.equal(noisy.argmin(1), torch.arange(16))
