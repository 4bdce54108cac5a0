"""The verb: what it leaves in the workspace, in 3D and 2D, and what a user is told who asks for something else."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launched import srun, torchrun

from genesis import cli
from genesis import discover as verb
from genesis.data.foreground import find_foreground
from genesis.data.phantom import Acquisition, phantom
from genesis.data.pseudo_labels import PseudoLabels
from genesis.data.samplers import Endless, WholeVolumes
from genesis.data.store import VolumeMeta, VolumeStore, write_volume
from genesis.discovery import anatomy
from genesis.discovery.latents import Reconstruction, encode, shrink
from genesis.discovery.neighbours import nearest_patients
from genesis.engine.optimizer import OptimizerSettings
from genesis.engine.trainer import fit
from genesis.files import read_json, verify_folder, write_json
from genesis.seeding import generator

TINY = [
    "discovery.autoencoder.steps=3", "discovery.autoencoder.batch_size=2", "discovery.autoencoder.channels=[4,8]",
    "discovery.classes=3", "discovery.neighbours=4", "discovery.validation_neighbours=2", "discovery.min_score=0",
    "network={name: unet, channels: [4,8], strides: [2], num_res_units: 0}",
]  # fmt: skip
TINY_3D = [*TINY, "data.patch_size=[16,16,16]", "discovery.autoencoder.shape=[16,16,16]"]
TINY_2D = [*TINY, "data.patch_size=[16,16]", "discovery.autoencoder.shape=[16,16]"]
SPLITS = ("train",) * 5 + ("val",) * 2 + ("test",)


def make_store(
    folder: Path, patients: list[tuple[int, int]], flat: bool = False, splits: tuple[str, ...] = SPLITS
) -> None:
    """Scans of phantoms, (body, noise) each, with their organs; `flat`: as images."""
    for number, (body, noise) in enumerate(patients):
        acquisition = Acquisition(
            shape=(44 + body % 4, 40, 34), spacing_mm=(7.0, 7.0, 8.0), centre_mm=(0.0, 0.0, 20.0 * (body % 3 - 1))
        )
        scan = phantom(generator(body, "anatomy"), generator(noise, "noise"), acquisition)
        ct, labels = (scan.ct[:, :, 17:18], scan.labels[:, :, 17:18]) if flat else (scan.ct, scan.labels)
        box = find_foreground(ct.astype(np.float32), scan.spacing_mm, "ct").box(ct.shape)
        meta = VolumeMeta(
            volume=f"v{number}", patient=f"p{number}", source=f"v{number}", modality="ct", shape=(1, *ct.shape),
            spacing_mm=scan.spacing_mm, affine=tuple(map(tuple, np.diag([*scan.spacing_mm, 1.0]).tolist())),
            scale=(1.0,), offset=(0.0,), clipped_share=0.0, percentiles=((-900.0, 600.0),),
            foreground_box=box, split=splits[number % len(splits)], labelled=True, target=None,
            values=(float(ct.min()), float(ct.max())),
        )  # fmt: skip
        write_volume(folder, ct[None], meta, labels)
    write_json(folder / "audit.json", {"label_names": {}, "sample": False})


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose store holds five training patients, two held out, and one for test."""
    workspace = tmp_path_factory.mktemp("scans")
    make_store(workspace / "store", [(number, number) for number in range(8)])
    return workspace


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "REFERENCES", 2)


@pytest.fixture
def workspace(scans: Path, tmp_path: Path) -> Path:
    return shutil.copytree(scans, tmp_path / "workspace")


def arguments(workspace: Path, settings: list[str]) -> list[str]:
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    return ["--workspace", str(workspace), "--device", "cpu", *overrides]


def discover(workspace: Path, settings: list[str], *more: str) -> None:
    cli.main(["discover", *arguments(workspace, settings), *more])


def refused(workspace: Path, settings: list[str], capsys: pytest.CaptureFixture[str], *more: str) -> str:
    with pytest.raises(SystemExit) as ended:
        discover(workspace, settings, *more)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_it_leaves_a_table_its_quality_and_pictures(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    discover(workspace, TINY_3D)
    folder = workspace / "discovery" / "3d"
    verify_folder(folder)
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == {
        "SHA256SUMS", "autoencoder.safetensors", "config.yaml", "discovery.json", "figures/anchors.png",
        "figures/classes.png", "figures/neighbours.png", "latents.npy", "latents.txt", "pseudo_labels.csv",
        "quality.json",
    }  # fmt: skip
    table = PseudoLabels.read(folder / "pseudo_labels.csv")
    assert set(table.patient[table.split == "train"]) <= {f"p{number}" for number in range(5)}
    assert set(table.patient[table.split == "val"]) <= {"p5", "p6"}
    assert len(set(table.reference)) == 1
    for number in range(table.classes):
        rows = (table.class_ == number) & (table.split == "train")
        assert len(set(table.patient[rows])) == rows.sum()  # a patient once in a class
        assert table.volume[rows][0] == table.reference[rows][0]
        assert (np.diff(table.distance[rows]) >= 0).all()
    quality = read_json(folder / "quality.json")
    assert set(quality["anatomy"]) == {"voxel", "body", "matched", "random"}
    assert 0 < quality["coverage"] <= 1
    assert quality["similarity"]["within"] > quality["similarity"]["between"]
    assert "Next: python -m genesis.train --dim 3d --workspace" in capsys.readouterr().out.splitlines()[-1]
    before = (folder / "pseudo_labels.csv").read_bytes(), (folder / "latents.npy").read_bytes()
    discover(workspace, TINY_3D)
    assert before == ((folder / "pseudo_labels.csv").read_bytes(), (folder / "latents.npy").read_bytes())


def test_every_class_may_have_a_reference_of_its_own(workspace: Path) -> None:
    discover(workspace, [*TINY_3D, "discovery.references=per_class", "discovery.anchor_space=body"])
    table = PseudoLabels.read(workspace / "discovery" / "3d" / "pseudo_labels.csv")
    assert table.classes == len(set(table.reference)) == 3


def test_in_2d_every_anchor_has_a_slice_and_neighbours_of_its_own(workspace: Path) -> None:
    discover(workspace, TINY_2D, "--dim", "2d")
    folder = workspace / "discovery" / "2d"
    assert np.load(folder / "latents.npy").shape == (7, 3, 8)  # patients, anchors, latent
    table = PseudoLabels.read(folder / "pseudo_labels.csv")
    assert (table.sz == 1).all()
    assert len(set(table.cz_mm[table.rank == 0])) > 1
    distances = [table.distance[(table.class_ == number) & (table.rank == 1)].tolist() for number in range(3)]
    assert len({tuple(distance) for distance in distances}) > 1


def test_images_are_discovered_in_2d(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "store", [(number, number) for number in range(7)], flat=True)
    discover(tmp_path, TINY_2D, "--dim", "2d")
    table = PseudoLabels.read(tmp_path / "discovery" / "2d" / "pseudo_labels.csv")
    assert (table.z == 0).all()
    assert (table.cz_mm == 0).all()
    assert read_json(tmp_path / "discovery" / "2d" / "quality.json")["matches"]["median"] > 0.3
    assert "use --dim 2d" in refused(tmp_path, TINY_3D, capsys)


def test_a_small_cohort_is_said_to_be_small(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    discover(workspace, [*TINY_3D, "discovery.neighbours=200", "discovery.anchor_space=voxel"])
    assert "There are 5 training patients" in capsys.readouterr().out
    table = PseudoLabels.read(workspace / "discovery" / "3d" / "pseudo_labels.csv")
    assert len(table.select("train")) == 15


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        (TINY_3D, ("--dim", "2d"), "data.patch_size has 3 numbers"),
        (TINY_3D, ("--dim", "2d", "--config", "semantic_genesis_3d"), "pass --dim to match it"),
        ([*TINY_3D, "data.patch_size=[64,64,64]"], (), "larger than the median volume"),
        ([*TINY_3D, "network={name: published_unet}", "data.patch_size=[24,24,20]"], (), "multiples of 8"),
        ([*TINY_3D, "discovery.min_score=1"], (), "lower discovery.min_score"),
        ([*TINY_3D, "discovery.klasses=3"], (), "did you mean classes?"),
        (TINY_3D, ("--data", "nowhere", "--modality", "ct"), "nowhere"),
    ],
)
def test_mistakes_are_named_and_leave_what_was_there(
    workspace: Path, settings: list[str], more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = workspace / "discovery" / "3d" / "pseudo_labels.csv"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of an earlier discovery")
    assert words in refused(workspace, settings, capsys, *more)
    assert [file.name for file in (workspace / "discovery").rglob("*") if file.is_file()] == [earlier.name]


def test_too_few_patients_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "one" / "store", [(0, 0), (1, 1)], splits=("train", "val"))
    assert "at least two patients" in refused(tmp_path / "one", TINY_3D, capsys)


def test_a_cohort_too_small_to_hold_anyone_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "store", [(0, 0), (1, 1), (2, 2)], splits=("train",))
    discover(tmp_path, TINY_3D)
    assert capsys.readouterr().out.count("No patient is held out for validation") == 1
    table = PseudoLabels.read(tmp_path / "discovery" / "3d" / "pseudo_labels.csv")
    assert set(table.split) == {"train"}
    cli.main(
        ["train", *arguments(tmp_path, ["train.workers=0", "train.batch_size=2", *TINY_3D[-3:-2]]), "--steps", "2"]
    )
    assert "no patches of held-out patients judge it" in capsys.readouterr().out
    cli.main(["export", *arguments(tmp_path, [])])


def test_noisy_copies_of_a_phantom_are_mutually_nearest(tmp_path: Path) -> None:
    """The floor: of 40 scans of 20 phantoms, at least 95 % and their twin are each other's nearest neighbour."""
    make_store(tmp_path, [(number % 20, number) for number in range(40)], splits=("train",))
    store = VolumeStore(tmp_path)
    metas = [replace(meta, patient=meta.volume) for meta in store.select()]
    volumes = shrink(
        WholeVolumes(store, metas, shape=(24, 24, 24), window_hu=(-1000.0, 1000.0)), tmp_path / "v.npy", lambda: None
    )
    torch.manual_seed(0)
    method = Reconstruction(3, (8, 16, 32), 1)
    fit(
        method, Endless(volumes, 0), validation=None, folder=tmp_path / "run", seed=0, device="cpu", steps=100,
        batch_size=8, optimizer=OptimizerSettings("adam", 1e-3), title="autoencoder", validate_every=100, workers=0,
    )  # fmt: skip
    latents = encode(method.autoencoder, volumes, torch.device("cpu"))
    ids = [meta.volume for meta in metas]
    nearest = [ids[nearest_patients(row, latents, ids, range(40), 2)[0][1]] for row in range(40)]
    twins = [f"v{(int(volume[1:]) + 20) % 40}" for volume in ids]
    found = np.array([a == b for a, b in zip(nearest, twins, strict=True)])
    assert np.mean(found & np.roll(found, 20)) >= 0.95


@pytest.mark.parametrize(
    ("processes", "more", "words"),
    [
        (2, ("--data", "scans"), "run python -m genesis.prepare --data SCANS"),
        (6, (), "5 training volumes for 6 processes"),
    ],
)
def test_what_several_processes_cannot_do_is_said(
    workspace: Path,
    processes: int,
    more: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verb, "launch", lambda device: SimpleNamespace(world_size=processes))
    assert words in refused(workspace, TINY_3D, capsys, *more)


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(workspace: Path, tmp_path: Path) -> None:
    """To the bit, however long the autoencoder learns, with as many threads."""
    alone, long = shutil.copytree(workspace, tmp_path / "alone"), [*TINY_3D, "discovery.autoencoder.steps=200"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what torchrun gives each of several processes
    try:
        discover(alone, long)
    finally:
        torch.set_num_threads(threads)
    ((code, said),) = torchrun("-m", "genesis.discover", *arguments(workspace, long))
    assert code == 0, said
    assert said.count("autoencoder 200/200") == 1
    assert said.count("Pseudo-labels are in") == 1
    verify_folder(workspace / "discovery" / "3d")
    one, two = (place / "discovery" / "3d" for place in (alone, workspace))
    files = [sorted(file.relative_to(folder) for file in folder.rglob("*")) for folder in (one, two)]
    assert files[0] == files[1]
    for name in ("pseudo_labels.csv", "latents.npy", "latents.txt", "autoencoder.safetensors", "config.yaml"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert read_json(one / "discovery.json") == read_json(two / "discovery.json")


@pytest.mark.slow
def test_what_one_process_cannot_read_ends_both_with_one_sentence(workspace: Path) -> None:
    file = workspace / "store" / "volumes" / "v6.b2nd"  # the last of those held out, so of the second process
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ended = srun("-m", "genesis.discover", *arguments(workspace, TINY_3D))
    said = "".join(text for _, text in ended)
    assert [code for code, _ in ended] == [2, 2], said
    assert said.count("genesis discover: Volume v6 is damaged") == 1
    assert "Traceback" not in said
    assert not list((workspace / "discovery").iterdir())
