"""Batches of a training: the same whatever step it begins at, and made for several steps at once where that pays."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from genesis.engine import batches
from genesis.engine.batches import training_batches, validation_batches
from genesis.engine.launch import launch
from genesis.engine.method import Batch
from genesis.errors import UserError


class Together(Dataset[Batch]):
    """Samples that know how many were asked for with them, and which was the first of those."""

    def __init__(self, voxels: int, device: str = "cpu") -> None:
        self.voxels, self.device = voxels, device

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        key = torch.tensor(indices, device=self.device)
        image = torch.zeros(1, device=self.device).expand(len(key), self.voxels)
        return {
            "image": image,
            "key": key,
            "first": key[0].expand(len(key)),
            "count": torch.full_like(key, len(key)),
        }


def doubled(batch: Batch) -> Batch:
    return {**batch, "double": 2 * batch["key"]}


def made(steps: range, *, voxels: int = 10, batch_size: int = 4, device: str = "cpu") -> list[dict[str, list[int]]]:
    how: dict = {"steps": steps, "batch_size": batch_size, "workers": 0}
    found = training_batches(Together(voxels, device), launch(device), doubled, **how)
    return [{name: values.tolist() for name, values in batch.items() if name != "image"} for batch in found]


def test_every_step_has_its_samples_prepared() -> None:
    found = made(range(20))
    assert [batch["key"] for batch in found] == [list(range(4 * step, 4 * step + 4)) for step in range(20)]
    assert all(batch["double"] == [2 * key for key in batch["key"]] for batch in found)


@pytest.mark.parametrize("start", [0, 3, 8, 19])
def test_what_is_made_with_a_sample_does_not_depend_on_where_training_begins_or_ends(start: int) -> None:
    assert made(range(start, 20)) == made(range(40))[start:20]


def test_without_steps_nothing_is_made() -> None:
    def never(batch: Batch) -> Batch:
        raise AssertionError

    assert not list(training_batches(Together(10), launch("cpu"), never, steps=range(12, 12), batch_size=4, workers=0))


@pytest.mark.parametrize(("voxels", "steps"), [(10, 8), (2**15, 8), (2**16, 4), (2**18, 1), (2**20, 1)])
def test_small_batches_are_made_for_several_steps_at_once(voxels: int, steps: int) -> None:
    """Of four samples each; 2^20 voxels at once."""
    counts = {count for batch in made(range(9), voxels=voxels) for count in batch["count"]}
    assert counts == {4 * steps}
    assert batches.VOXELS_AT_ONCE == 2**20


@pytest.mark.parametrize(
    ("memory", "voxels", "cut_on", "steps"),
    [
        (141e9, 2**17, "cuda", 7),
        (141e9, 2**12, "cuda", 8),
        (80e9, 2**17, "cuda", 3),
        (8e9, 2**17, "cuda", 1),
        (141e9, 2**12, "cpu", 1),
    ],
)
def test_how_many_on_cuda_depends_on_its_memory(
    memory: float, voxels: int, cut_on: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 samples each; one at a time of what streams."""
    properties = SimpleNamespace(total_memory=int(memory))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    image = SimpleNamespace(device=torch.device(cut_on), numel=lambda: voxels)
    assert batches._steps_at_once([{"image": image}], torch.device("cuda"), 64) == steps  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_cuda_every_step_has_its_samples() -> None:
    found = made(range(3, 20), device="cuda")
    assert [batch["key"] for batch in found] == [list(range(4 * step, 4 * step + 4)) for step in range(3, 20)]
    assert {count for batch in found for count in batch["count"]} == {32}


def test_samples_that_cannot_be_made_at_once_say_how_many_can() -> None:
    """So on the CPU, where the batches of a step do not become too large otherwise."""

    def hungry(batch: Batch) -> Batch:
        return {"image": batch["image"], "key": torch.empty(2**58 if len(batch["key"]) > 21 else len(batch["key"]))}

    how: dict = {"steps": range(3), "workers": 0}
    found = training_batches(Together(2**18), launch("cpu"), hungry, batch_size=64, **how)
    with pytest.raises(UserError, match=r"64 patches at once do not fit into the memory of this machine .* 21 do: use"):
        next(found)
    assert len(list(training_batches(Together(2**18), launch("cpu"), hungry, batch_size=21, **how))) == 3


def test_memory_that_others_took_is_not_said_to_be_the_batch() -> None:
    def once(batch: Batch, calls: list[int] = []) -> Batch:  # noqa: B006  to be remembered
        calls.append(1)
        return {"image": torch.empty(2**58) if len(calls) == 1 else batch["image"]}

    with pytest.raises(UserError, match=r"^Memory ran out while patches were made: use fewer train.workers"):
        next(training_batches(Together(2**18), launch("cpu"), once, steps=range(3), batch_size=8, workers=0))


def test_validation_can_be_repeated() -> None:
    held_out = torch.utils.data.Subset(Together(10), range(6))
    found = validation_batches(held_out, launch("cpu"), doubled, batch_size=4, workers=0)
    for _ in range(2):
        assert [batch["double"].tolist() for batch in found] == [[0, 2, 4, 6], [8, 10]]
