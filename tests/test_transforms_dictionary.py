"""The adapter behaves like a MONAI dictionary transform."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureTyped
from monai.utils import set_determinism

from genesis.transforms import BatchGenerator, BezierNonlinearity, Corruption, Flip, LocalShuffle, Paint, Transform
from genesis.transforms.dictionary import DictionaryTransform

IMAGE = torch.rand((2, 24, 20, 28), generator=torch.Generator().manual_seed(0))


def pipeline() -> Compose:
    return Compose(
        [
            EnsureTyped("image"),
            DictionaryTransform("image", Flip()),
            DictionaryTransform("image", LocalShuffle(), prob=0.5),
            DictionaryTransform("image", Corruption(), target_keys="target"),
        ]
    )


def test_compose_is_reproducible_by_its_random_state() -> None:
    first, again, other = (pipeline().set_random_state(seed) for seed in (1, 1, 2))
    runs = [[compose({"image": IMAGE}) for _ in range(3)] for compose in (first, again, other)]
    for one, same in zip(runs[0], runs[1], strict=True):
        for key in ("image", "target"):
            assert torch.equal(one[key], same[key])
    assert not torch.equal(runs[0][0]["image"], runs[0][1]["image"])
    assert not torch.equal(runs[0][0]["image"], runs[2][0]["image"])


def test_set_determinism() -> None:
    results = []
    for _ in range(2):
        set_determinism(seed=5)
        results.append(pipeline()({"image": IMAGE})["image"])
    set_determinism(seed=None)
    assert torch.equal(*results)


@pytest.mark.parametrize("transform", [Flip(), LocalShuffle(), BezierNonlinearity(), Paint()], ids=str)
def test_images_stay_what_they_are_and_keys_agree(transform: Transform) -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    data = {"array": IMAGE.numpy().copy(), "meta": MetaTensor(IMAGE.clone(), affine=affine), "tensor": IMAGE, "id": 7}
    adapter = DictionaryTransform(("array", "meta", "tensor"), transform).set_random_state(3)
    result = adapter(data)
    assert isinstance(result["array"], np.ndarray)
    assert isinstance(result["meta"], MetaTensor)
    assert torch.equal(result["meta"].affine, affine)
    assert type(result["tensor"]) is torch.Tensor
    assert result["id"] == 7
    for key in ("array", "meta"):
        assert torch.equal(torch.as_tensor(result[key]), result["tensor"])
    for key in ("array", "meta", "tensor"):
        assert torch.equal(torch.as_tensor(data[key]), IMAGE)


def test_corruption_yields_its_target() -> None:
    adapter = DictionaryTransform(("a", "b"), Corruption(), target_keys=("x", "y")).set_random_state(0)
    result = adapter({"a": IMAGE, "b": IMAGE[:1]})
    assert set(result) == {"a", "b", "x", "y"}
    assert torch.equal(result["x"][:1], result["y"])
    assert not torch.equal(result["a"], result["x"])
    never = DictionaryTransform("a", Corruption(), prob=0.0, target_keys="x")({"a": IMAGE})
    assert torch.equal(never["a"], IMAGE)
    assert torch.equal(never["x"], IMAGE)


def test_probability() -> None:
    adapter = DictionaryTransform("image", Corruption(), prob=0.3, target_keys="t").set_random_state(0)
    small = IMAGE[:1, :8, :8, :8]
    changed = sum(not torch.equal((result := adapter({"image": small}))["image"], result["t"]) for _ in range(300))
    assert 50 < changed < 120


def test_missing_keys() -> None:
    with pytest.raises(KeyError):
        DictionaryTransform(("image", "other"), Flip())({"image": IMAGE})
    result = DictionaryTransform(("image", "other"), Flip(), allow_missing_keys=True)({"image": IMAGE})
    assert set(result) == {"image"}


def test_target_keys_belong_to_corruption_alone() -> None:
    with pytest.raises(ValueError, match="target_keys"):
        DictionaryTransform("image", Corruption())
    with pytest.raises(ValueError, match="target_keys"):
        DictionaryTransform("image", Flip(), target_keys="target")


def test_a_function_of_a_batch_and_a_generator_will_do() -> None:
    def brighten(x: torch.Tensor, generator: BatchGenerator) -> torch.Tensor:
        return x + generator.uniform().view(-1, 1, 1, 1, 1)

    result = DictionaryTransform("image", brighten).set_random_state(0)({"image": IMAGE})
    assert (result["image"] - IMAGE).std() < 1e-6
