"""Fine-tuning's data, methods and figures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blobs import write_store
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric

from genesis.data.labelled import Classes, LabelledImages, LabelledPatches, LabelledVolumes, native_labels, whole_box
from genesis.data.store import VolumeStore
from genesis.errors import UserError
from genesis.methods.supervised import (
    Classification,
    Segmentation,
    auc_per_class,
    by_class,
    dice_per_class,
    segment,
)
from genesis.models import Classifier, build_backbone

WINDOW = (-1000.0, 1000.0)
CLASSES = Classes((2, 5), ("bright", "grey"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    return write_store(tmp_path_factory.mktemp("store"))


def patches(
    store: VolumeStore, seed: int = 0, share: float = 1.0, size: tuple[int, ...] = (8, 8, 8)
) -> LabelledPatches:
    return LabelledPatches(
        store, list(store), CLASSES, patch_size=size, spacing_mm=(2.0,) * len(size), window_hu=WINDOW,
        foreground_share=share, seed=seed,
    )  # fmt: skip


def test_classes_are_the_named_values_and_a_stranger_is_refused(store: VolumeStore, tmp_path: Path) -> None:
    assert Classes.of(store, list(store)) == CLASSES
    assert CLASSES.index(torch.tensor([[0, 2], [5, 0]])).tolist() == [[0, 1], [2, 0]]
    unnamed = write_store(tmp_path, names={})
    assert Classes.of(unnamed, list(unnamed)) == Classes((2, 5), ("label 2", "label 5"))
    strange = write_store(tmp_path, names={1: "liver", 2: "bright"})
    with pytest.raises(UserError, match=r"v00 holds the value 5.*named are 1, 2"):
        Classes.of(strange, list(strange))


@pytest.mark.parametrize("size", [(8, 8, 8), (8, 8)])
def test_a_patch_depends_on_seed_and_index_alone(store: VolumeStore, size: tuple[int, ...]) -> None:
    one, two = patches(store, size=size), patches(store, size=size)
    two[3]
    for name, value in one[11].items():
        assert torch.equal(value, two[11][name])
    assert not torch.equal(one[11]["image"], patches(store, seed=1, size=size)[11]["image"])
    assert one[0]["image"].shape == (1, *size)
    assert one[0]["label"].shape == size


def test_centred_patches_show_both_classes_evenly_and_every_case_in_turn(store: VolumeStore) -> None:
    data = patches(store)
    middle = torch.stack([data[i]["label"][3:5, 3:5, 3:5].amax() for i in range(120)])
    assert (middle > 0).float().mean() > 0.95
    assert 0.35 < (middle == 1).float().mean() < 0.65
    keys = {int(data[i]["key"]) for i in range(120)}
    assert len(keys) == 120


def test_bright_voxels_stay_under_their_label(store: VolumeStore) -> None:
    """Image and label map are cut at the same place: the ball of 500 HU is brighter than everything else."""
    data = patches(store, share=0.5)
    compared = 0
    for index in range(20):
        image, label = data[index]["image"][0], data[index]["label"]
        assert image.min() >= 0
        assert image.max() <= 1
        if (label == 1).sum() > 20 and (label == 0).sum() > 20:
            assert image[label == 1].median() > image[label == 0].quantile(0.9)
            compared += 1
    assert compared > 5


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 3.0), (1.5, 1.5, 1.5), (3.1, 2.7, 4.0), None, (1.3, 1.7)])
def test_labels_return_to_the_native_grid(store: VolumeStore, spacing: tuple[float, ...] | None) -> None:
    """Label map → grid of patches → native grid loses no more than the interpolation must."""
    meta = store["v01"].meta
    item = LabelledVolumes(store, [meta], CLASSES, spacing_mm=spacing, window_hu=WINDOW)[0]
    assert item["label"].shape == item["image"].shape[1:] == whole_box(meta, spacing)[2]
    back = native_labels(torch.nn.functional.one_hot(item["label"], 3).movedim(-1, 0).float(), meta, spacing)
    truth = CLASSES.truth(store, meta)
    assert back.shape == truth.shape
    dice = dice_per_class(back, truth, 2)
    exact = spacing in (None, (2.0, 2.0, 3.0))
    assert (dice == 1).all() if exact else (dice > 0.8).all()


def test_no_slice_at_the_border_is_left_out(store: VolumeStore) -> None:
    """102 slices of 1 mm are 20.4 of 5 mm: with 20, the first and the last would have no prediction."""
    meta = replace(store["v01"].meta, shape=(1, 8, 8, 102), spacing_mm=(5.0, 5.0, 1.0))
    shape = whole_box(meta, (5.0, 5.0, 5.0))[2]
    assert shape == (8, 8, 21)
    everywhere = torch.stack([torch.zeros(shape), torch.ones(shape)])
    assert native_labels(everywhere, meta, (5.0, 5.0, 5.0)).all()


def test_dice_is_monais_except_for_what_only_the_prediction_has() -> None:
    predicted, truth = torch.randint(0, 4, (2, 9, 9, 9), generator=torch.Generator().manual_seed(0))
    ours = dice_per_class(predicted, truth, 3)
    theirs = DiceMetric(include_background=False, num_classes=4)(predicted[None, None], truth[None, None])[0]
    assert torch.allclose(ours, theirs)
    empty = torch.zeros_like(truth)
    only_one = torch.where(truth == 1, 1, 0)
    assert dice_per_class(only_one, empty, 3).nan_to_num(-1).tolist() == [0, -1, -1]
    assert by_class(("a", "b"), torch.tensor([0.5, float("nan")])) == {"mean": 0.5, "a": 0.5}
    assert by_class(("a",), torch.tensor([float("nan")])) == {}


def test_auc_counts_pairs_in_the_right_order() -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 3, (40,), generator=generator)
    scores = torch.rand(40, 3, generator=generator).softmax(dim=1)
    for k, value in enumerate(auc_per_class(scores, target)):
        pairs = scores[target == k, k][:, None] > scores[target != k, k]
        assert value == pytest.approx(pairs.float().mean())
    assert auc_per_class(scores, torch.zeros(40, dtype=torch.int64)).isnan().all()


def test_the_loss_is_monais_dice_ce_of_the_classes_in_the_batch() -> None:
    backbone = build_backbone("unet", spatial_dims=3, out_channels=3, channels=(4, 8), strides=(2,), num_res_units=0)
    method = Segmentation(backbone, ("a", "b"), background_weight=0.1, patch_size=(8, 8, 8))
    batch = {"image": torch.rand(2, 1, 8, 8, 8), "label": torch.randint(0, 3, (2, 8, 8, 8))}
    theirs = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, weight=torch.tensor([0.1, 1.0, 1.0])
    )
    with torch.no_grad():
        ours = sum(method(batch).losses.values())
        assert float(ours) == pytest.approx(float(theirs(backbone(batch["image"]), batch["label"][:, None])))
        batch["label"] = batch["label"] // 2  # class 2 is absent now, and its Dice loss is 1 whatever one predicts
        with_absent = theirs.dice(backbone(batch["image"]), batch["label"][:, None])
        assert float(method(batch).losses["dice_loss"]) == pytest.approx(2 * float(with_absent) - 1, abs=1e-5)


@pytest.mark.parametrize(("dims", "shape"), [(3, (20, 9, 17)), (2, (20, 9, 5))])
def test_segment_covers_any_volume(dims: int, shape: tuple[int, ...]) -> None:
    backbone = build_backbone(
        "unet", spatial_dims=dims, out_channels=3, channels=(4, 8), strides=(2,), num_res_units=0
    ).eval()
    image = torch.rand(1, *shape)
    probabilities = segment(backbone, image, (8,) * dims)
    assert probabilities.shape == (3, *shape)
    assert torch.allclose(probabilities.sum(0), torch.ones(shape), atol=1e-5)
    nothing = segment(backbone, torch.zeros(1, *shape), (8,) * dims)
    assert torch.allclose(nothing[0], torch.ones(shape))
    if dims == 2:
        assert torch.allclose(segment(backbone, image[..., 2:3], (8, 8))[..., 0], probabilities[..., 2], atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_segmentation_from_scratch_learns_every_class(store: VolumeStore, dims: int) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(
        "unet", spatial_dims=dims, out_channels=3, channels=(8, 16), strides=(2,), num_res_units=dims - 1
    )
    size, spacing = (16,) * dims, (2.0, 2.0, 3.0)[:dims]
    method = Segmentation(backbone, ("bright", "grey"), background_weight=0.1, patch_size=size)
    train = LabelledPatches(
        store, store.select("train"), CLASSES, patch_size=size, spacing_mm=spacing, window_hu=WINDOW,
        foreground_share=0.7, seed=0,
    )  # fmt: skip
    held_out = LabelledVolumes(store, store.select("test"), CLASSES, spacing_mm=spacing, window_hu=WINDOW)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for step in range(80):
        items = [train[4 * step + i] for i in range(4)]
        loss = sum(method({name: torch.stack([i[name] for i in items]) for name in items[0]}).losses.values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    figures = method.eval().validate([{name: value[None] for name, value in held_out[i].items()} for i in range(2)])
    assert figures["dice/bright"] > 0.5
    assert figures["dice/grey"] > 0.5
    assert figures["loss"] == pytest.approx(1 - figures["dice/mean"])


def test_classification_trains_the_encoder_only(store: VolumeStore) -> None:
    backbone = build_backbone("unet", spatial_dims=3, channels=(4, 8), strides=(2,), num_res_units=0)
    method = Classification(Classifier(backbone, 2), ("0", "1"))
    names = {name.split(".")[0] for name, _ in method.classifier.named_parameters()}
    assert names == {"encoder", "linear"}
    data = LabelledImages(
        store, list(store), (0, 1), patch_size=(16, 16, 16), spacing_mm=(2.0, 2.0, 2.0), window_hu=WINDOW, seed=None
    )
    items = [data[i] for i in range(len(data))]
    assert [int(item["label"]) for item in items] == [0, 1, 0, 1, 0, 1]
    figures = method.eval().validate([{name: value[None] for name, value in item.items()} for item in items])
    assert set(figures) == {"loss", "auc/mean", "auc/0", "auc/1"}
    method({name: torch.stack([i[name] for i in items]) for name in items[0]}).losses["cross_entropy"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_a_large_body_is_shrunk_into_the_patch_and_a_small_one_is_not_enlarged(store: VolumeStore) -> None:
    for size, corner in (((8, 8, 8), False), ((64, 64, 64), True)):
        data = LabelledImages(
            store, list(store), (0, 1), patch_size=size, spacing_mm=(2.0, 2.0, 3.0), window_hu=WINDOW, seed=None
        )
        image = data[0]["image"][0]
        assert (image[0, 0, 0] == 0) == corner
        inside = (image > 0.05).float().mean()
        assert inside > 0.5 if not corner else inside == pytest.approx(20 * 18 * 16 / 64**3, rel=0.3)


def test_a_network_that_predicts_background_only_has_collapsed() -> None:
    backbone = build_backbone(
        "unet", spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), num_res_units=0
    )
    method = Segmentation(backbone, ["liver"], background_weight=0.1, patch_size=(16, 16, 16)).eval()
    label = torch.zeros(1, 16, 16, 16, dtype=torch.int64)
    label[:, 4:12, 4:12, 4:12] = 1
    batch = {"image": label[:, None].float(), "label": label, "key": torch.zeros(1, dtype=torch.int64)}
    with torch.no_grad():
        for weight in method.parameters():
            weight.zero_()
    (message,) = method.collapsed(method.validate([batch]))  # of equal classes the first, the background
    assert "no voxel of any class" in message
    with torch.no_grad():
        for weight in method.parameters():
            if weight.shape == (2,):  # the output layer's bias
                weight[1] = 1.0
    assert method.collapsed(method.validate([batch])) == []
