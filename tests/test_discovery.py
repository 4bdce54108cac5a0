"""Self-discovery: nearest patients, anchors, matching and what it is worth on phantoms, against slow oracles."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from genesis.data.phantom import Acquisition, phantom
from genesis.data.sample_cohort import write_sample_cohort
from genesis.data.store import VolumeStore
from genesis.discovery.anatomy import carried_anatomy
from genesis.discovery.anchors import choose_anchors
from genesis.discovery.body import coarse_step_mm, from_body, to_body
from genesis.discovery.classes import make_classes, match, pairs_of
from genesis.discovery.matching import Pass, carry, correlate
from genesis.discovery.neighbours import Neighbour, merge, nearest_patients
from genesis.errors import UserError
from genesis.evaluation.probes import effective_rank
from genesis.prepare import prepare
from genesis.seeding import generator
from genesis.workspace import Workspace

PATCH = {"patch_size": (24, 24, 24), "spacing_mm": (3.7, 3.7, 3.7)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """Phantoms varied in anatomy, pose, field of view, spacing and noise."""
    folder = tmp_path_factory.mktemp("discovery")
    data = write_sample_cohort(folder / "sample", seed=1, patients=32)
    prepare(data, folder / "store", Workspace(folder), modality="ct", sample=True, workers=1)
    return VolumeStore(folder / "store")


def test_nearest_patients_are_those_of_a_naive_search() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(60, 5)).astype(np.float32)
    patients = [f"p{number % 25}" for number in range(60)]
    among = list(range(0, 60, 2))
    rows, distances = nearest_patients(4, latents, patients, among, 10)
    best: dict[str, tuple[float, int]] = {}
    for row in among:
        distance = float(np.linalg.norm(latents[row] - latents[4]))
        best[patients[row]] = min(best.get(patients[row], (np.inf, -1)), (distance, row))
    expected = sorted(best.values())[:10]
    assert rows.tolist() == [row for _, row in expected]
    np.testing.assert_allclose(distances, [distance for distance, _ in expected], rtol=1e-5, atol=1e-6)
    assert rows[0] == 4
    assert distances[0] == 0


def test_nearest_patients_of_shares_are_those_of_the_whole() -> None:
    latents = np.random.default_rng(0).integers(0, 3, (60, 4)).astype(np.float32)  # many ties
    patients = [f"p{number % 25}" for number in range(60)]
    for reference in (0, 31, 59):
        rows, distances = nearest_patients(reference, latents, patients, range(50), 10)
        parts = []
        for start, stop in ((0, 20), (20, 45), (45, 52), (52, 60)):
            near, away = nearest_patients(
                reference - start, latents[start:stop], patients[start:stop], range(min(stop, 50) - start), 10,
                latents[reference],
            )  # fmt: skip
            parts.append((near + start, away))
        again = merge(parts, reference, patients, 10)
        assert again[0].tolist() == rows.tolist()
        assert again[1].tolist() == distances.tolist()


def test_the_reference_comes_before_its_twin() -> None:
    latents = np.zeros((3, 4), np.float32)
    assert nearest_patients(2, latents, ["a", "b", "c"], [0, 1, 2], 3)[0][0] == 2


def test_effective_rank_tells_a_collapsed_latent() -> None:
    spread = torch.randn(50, 8, generator=generator(0, "rank"))
    assert effective_rank(spread) > 6
    assert effective_rank(spread[:, :1] * torch.ones(8)) == pytest.approx(1, abs=1e-3)


def test_correlation_is_that_of_the_formula() -> None:
    source = generator(0, "correlation")
    fixed, moving = torch.rand(14, 13, 12, generator=source), torch.rand(15, 16, 11, generator=source)
    search = Pass(template=2, radius=1, smooth=1.0)
    here, there = torch.tensor([[6, 6, 6], [7, 5, 5]]), torch.tensor([[7, 7, 5], [6, 8, 6]])
    found = correlate(fixed, moving, here, there, search)
    ramp = torch.exp(-2 * (torch.arange(-2, 3) / 2.5) ** 2)
    weight = ramp[:, None, None] * ramp[:, None] * ramp
    weight = weight / weight.sum()
    for n in range(2):
        a = _window(fixed, here[n].tolist())
        for dx, dy, dz in ((0, 0, 0), (1, 0, -1), (-1, 1, 1)):
            b = _window(moving, (there[n] + torch.tensor([dx, dy, dz])).tolist())
            a0, b0 = a - (weight * a).sum(), b - (weight * b).sum()
            expected = (weight * a0 * b0).sum() / ((weight * a0**2).sum() * (weight * b0**2).sum()).sqrt()
            assert float(found[n, 1 + dx, 1 + dy, 1 + dz]) == pytest.approx(float(expected), abs=1e-4)


def _window(x: torch.Tensor, centre: list[int]) -> torch.Tensor:
    i, j, k = centre
    return x[i - 2 : i + 3, j - 2 : j + 3, k - 2 : k + 3]


def test_points_are_carried_onto_themselves_and_by_the_body_and_back(store: VolumeStore) -> None:
    metas = list(store)
    one, other = store[metas[0].volume], store[metas[1].volume]
    points = from_body(torch.tensor([[0.3, 0.4, 0.5], [0.6, 0.5, 0.4]]), one.meta)
    step = coarse_step_mm(metas)
    places, score = carry(points, one, one, space="matched", step_mm=step)
    assert float((places - points).norm(dim=1).max()) < step
    assert float(score.min()) > 0.95
    there, _ = carry(points, one, other, space="body", step_mm=step)
    torch.testing.assert_close(to_body(there, other.meta), to_body(points, one.meta))


def test_anchors_lie_in_the_body_apart_and_are_the_same_again(store: VolumeStore) -> None:
    metas = store.select("train")
    arguments = {**PATCH, "step_mm": coarse_step_mm(metas), "min_tissue": 0.5}
    references = [metas[0].volume] * 6
    anchors = choose_anchors(store, references, seed=0, **arguments)  # type: ignore[arg-type]
    assert anchors == choose_anchors(store, references, seed=0, **arguments)  # type: ignore[arg-type]
    assert anchors != choose_anchors(store, references, seed=1, **arguments)  # type: ignore[arg-type]
    body = torch.tensor([anchor.body for anchor in anchors])
    assert len(anchors) == 6
    assert bool(((body > 0) & (body < 1)).all())
    assert float(torch.pdist(torch.tensor([anchor.centre_mm for anchor in anchors])).min()) > 20  # mm


def test_a_class_is_one_anchor_in_several_patients(store: VolumeStore) -> None:
    metas = store.select("train")[:4]
    step = coarse_step_mm(metas)
    anchors = choose_anchors(store, [metas[0].volume] * 3, seed=0, step_mm=step, min_tissue=0.5, **PATCH)  # type: ignore[arg-type]
    near = [Neighbour(meta.volume, rank, float(rank), "train") for rank, meta in enumerate(metas)]
    steps: list[None] = []
    matches = match(
        store,
        anchors,
        pairs_of(anchors, dict.fromkeys(range(3), near)),
        space="body",
        step_mm=step,
        advance=lambda: steps.append(None),
    )
    classes = make_classes(store, matches, min_score=0.3, **PATCH)  # type: ignore[arg-type]
    table = classes.table
    assert len(steps) == 4
    assert table.classes == 3
    assert len(table) == 12
    for anchor, row in zip(anchors, np.flatnonzero(table.rank == 0), strict=True):
        np.testing.assert_allclose(table.centre_mm[row], anchor.centre_mm, atol=1e-3)
    last = next(one for one in matches[::-1] if one.neighbour.rank > 0)
    beyond = last._replace(centre_mm=(*last.centre_mm[:2], -0.6 * store[last.neighbour.volume].meta.spacing_mm[2]))
    fewer = make_classes(store, [beyond if one is last else one for one in matches], min_score=0.3, **PATCH)  # type: ignore[arg-type]
    assert (len(fewer.table), fewer.dropped) == (11, 1)
    with pytest.raises(UserError, match=r"lower discovery\.min_score"):
        make_classes(store, [one for one in matches if one.neighbour.rank == 0], min_score=0.3, **PATCH)  # type: ignore[arg-type]


def test_matching_carries_organs_to_where_they_are(store: VolumeStore) -> None:
    """The floors: landmark error at most half of voxel anchors' and of random neighbours', label agreement 0.8."""
    metas = store.select("train") + store.select("val")
    rng = np.random.default_rng(0)
    latents = {meta.volume: rng.normal(size=4).astype(np.float32) for meta in metas}  # neighbours at random: hardest
    anchors = torch.rand(8, 3, generator=generator(0, "places")) * 0.4 + 0.3
    found = carried_anatomy(
        store, latents, anchors, step_mm=coarse_step_mm(metas), min_score=0.3, seed=0, **PATCH  # type: ignore[arg-type]
    )  # fmt: skip
    error = {rule: found[rule]["landmark_error_mm"]["median"] for rule in ("voxel", "matched", "random")}
    assert error["matched"] <= 0.5 * min(error["voxel"], error["random"]), error
    assert found["matched"]["label_agreement"] >= 0.8 > found["voxel"]["label_agreement"] + 0.1
    assert found["matched"]["landmark_error_mm"]["count"] >= 30


def test_noisy_twins_are_matched_to_the_voxel(tmp_path: Path) -> None:
    """Two noisy scans of one phantom: matched anchors stay within a coarse voxel."""
    for number in range(2):
        scan = phantom(generator(0, "anatomy"), generator(number, "noise"), Acquisition())
        affine = np.diag([*scan.spacing_mm, 1.0])
        (tmp_path / "scans").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(scan.ct, affine), tmp_path / "scans" / f"twin{number}.nii.gz")
    prepare(tmp_path / "scans", tmp_path / "store", Workspace(tmp_path / "workspace"), modality="ct", workers=1)
    twins = VolumeStore(tmp_path / "store")
    one, other = (twins[volume] for volume in twins.ids)
    points = from_body(torch.tensor([[0.3, 0.4, 0.5], [0.6, 0.5, 0.4], [0.5, 0.5, 0.6]]), one.meta)
    step = coarse_step_mm(list(twins))
    places, score = carry(points, one, other, space="matched", step_mm=step)
    assert float((places - points).norm(dim=1).max()) < step
    assert float(score.min()) > 0.8
