"""ConVIRT and GLoRIA: methods, samples, and from a store with reports to a package that finds images by texts."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blobs import write_store as write_blobs
from reports_cohort import TEXTS, report_batch, save_bert, save_roberta, small_text_model
from test_train import ARGUMENTS, make_store

from genesis import cli, load_image_text
from genesis.config import load_config
from genesis.data.labelled import body_image
from genesis.data.reports import Report, read_reports, write_reports
from genesis.data.store import VolumeStore, write_volume
from genesis.engine.checkpoint import read_checkpoint
from genesis.engine.method import Batch
from genesis.engine.monitor import read_metrics
from genesis.errors import UserError
from genesis.files import read_json
from genesis.methods import image_text_method
from genesis.methods.image_text import ImageTextMethod
from genesis.models import build_backbone
from genesis.seeding import generator
from genesis.text.encoders import TextModel
from genesis.text.reports import text_hash
from genesis.text.studies import StudySamples, studies_of

METHODS = ("convirt", "gloria")
SIDES = (24, 24, 16)
TINY = [
    "data.patch_size=[16,16,16]",
    "data.spacing_mm=median",
    "method.text.length=32",
    "train.optimizer.schedule=constant",
]
SETTINGS = [*ARGUMENTS, *(part for setting in TINY for part in ("--set", setting))]


def build(name: str, text: TextModel, *overrides: str) -> ImageTextMethod:
    config = load_config(f"{name}_3d", overrides)
    torch.manual_seed(0)
    backbone = build_backbone(spatial_dims=3, name="unet", channels=(4, 8, 16), strides=(2, 2), num_res_units=1)
    return image_text_method(config.method, backbone, text, SIDES).train()  # type: ignore[arg-type]


def loss_of(method: ImageTextMethod, batch: Batch) -> torch.Tensor:
    return torch.stack(list(method(batch).losses.values())).sum()


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_can_learn_has_a_gradient(name: str) -> None:
    text = small_text_model()
    method = build(name, text)
    loss_of(method, report_batch(text, TEXTS, SIDES)).backward()
    for weight_name, weight in method.named_parameters():
        learns = weight.requires_grad and weight.grad is not None
        assert learns == (not weight_name.startswith("backbone.network") or weight.requires_grad), weight_name
    word = method.text.network.get_input_embeddings().weight.grad
    assert word.abs().sum() > 0  # known bug elsewhere: a text side that never trains
    if name == "convirt":
        first: Any = method.get_submodule("text_head")[0]  # type: ignore[index]
        assert first.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one(name: str) -> None:
    text = small_text_model()
    method = build(name, text)
    batch = report_batch(text, TEXTS[:1], SIDES)
    loss = loss_of(method, batch)
    assert loss.isfinite()
    loss.backward()
    figures = method.eval().validate([batch])
    assert figures["text_to_image"] == figures["chance"] == 1


@pytest.mark.parametrize("name", METHODS)
def test_padding_and_neighbours_change_no_embedding(name: str) -> None:
    longer, shorter = small_text_model(24), small_text_model(16)
    assert longer.encode.tokenizer.get_vocab() == shorter.encode.tokenizer.get_vocab()
    method = build(name, longer).eval()
    with torch.no_grad():
        all_, one, short = (
            method.texts(*(coded[key] for key in ("tokens", "mask", "word"))).whole
            for coded in (longer.encode(TEXTS), longer.encode(TEXTS[2:3]), shorter.encode(TEXTS[2:3]))
        )
    torch.testing.assert_close(all_[2:3], one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(short, one, atol=1e-5, rtol=1e-5)


def test_convirt_takes_the_maximum_over_tokens() -> None:
    text = small_text_model()
    method = build("convirt", text)
    coded = text.encode(TEXTS[:2])
    states = text(coded["tokens"], coded["mask"])[-1]
    slow = torch.stack([states[i][coded["mask"][i]].max(dim=0).values for i in range(2)])
    head: Any = method.get_submodule("text_head")
    torch.testing.assert_close(method.texts(coded["tokens"], coded["mask"], coded["word"]).whole, head(slow))


def test_equal_reports_and_equal_sentences_are_positives() -> None:
    text = small_text_model()
    method = build("convirt", text)
    batch = report_batch(text, [TEXTS[0], TEXTS[0], TEXTS[1]], SIDES)
    told_apart = {**batch, "report": torch.arange(3), "text": torch.arange(3)}
    assert loss_of(method, batch) != loss_of(method, told_apart)
    for name in ("report", "text"):
        torch.testing.assert_close(loss_of(method, {**told_apart, name: batch[name]}), loss_of(method, batch))


@pytest.mark.parametrize(("save", "frozen"), [(save_bert, 1), (save_roberta, 2)])
def test_a_pretrained_text_model_partly_frozen(save: Callable[[Path], None], frozen: int, tmp_path: Path) -> None:
    from genesis.text.encoders import read_text_model

    save(tmp_path)
    text = read_text_model(str(tmp_path), None, 24)
    method = build("gloria", text, f"method.text.frozen_layers={frozen}")
    loss_of(method, report_batch(text, TEXTS, SIDES)).backward()
    learn = [n for n, weight in method.text.named_parameters() if weight.grad is not None and weight.grad.any()]
    assert bool(learn) == (frozen == 1)
    assert not any("embeddings" in name for name in learn)
    assert not any(f"layer.{frozen - 1}." in name for name in learn)


@pytest.mark.parametrize("dims", [2, 3])
def test_left_stays_left(tmp_path: Path, dims: int) -> None:
    """Reports name sides: whatever is drawn, what is on the patient's right is shown there; so are front and top."""
    store = write_blobs(tmp_path, ("train",))
    meta = store.select("train")[0]
    ramps = np.indices(meta.shape[1:]) / np.reshape(meta.shape[1:], (3, 1, 1, 1))
    for axis in range(dims):
        write_volume(tmp_path, (1000 * ramps[axis] - 500).astype(np.int16)[None], meta)
        changed = VolumeStore(tmp_path)
        for number in range(30):
            image = body_image(changed, meta, (16,) * dims, None, (-500.0, 500.0), generator(0, "draw", number))[0]
            first, last = image.movedim(axis, 0).flatten(1).mean(1)[[4, -5]]
            assert first + 0.1 < last


def test_the_finest_map_with_few_enough_regions() -> None:
    text = small_text_model()
    assert build("gloria", text).images(torch.rand(1, 1, *SIDES)).regions.shape == (1, 128, 144)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"method.regions is 20, but the coarsest feature map has 144"):
        build("gloria", text, "method.regions=20")


def test_attention_is_one_map_per_word() -> None:
    text = small_text_model()
    method = build("gloria", text).eval()
    columns = method.pictures(report_batch(text, TEXTS[:2], SIDES))["attention"]
    assert list(columns) == ["image", "word 1", "word 2", "word 3", "word 4"]
    for maps in columns.values():
        assert maps.shape == (2, 1, *SIDES)
        assert maps.min() >= 0
        assert maps.max() <= 1


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Eight volumes of seven studies: the first two are reconstructions of one."""
    make_store(tmp_path / "store")
    ends = {number: "Zachariasson" if number in (3, 4) else str(number) for number in range(8)}
    reports = {
        f"v{number}": Report(f"s{max(number, 1)}", findings=f"{TEXTS[number % 4]} {ends[number]}.") for number in ends
    }
    write_reports(tmp_path / "store", {**reports, "v0": reports["v1"]})
    return tmp_path


def samples(workspace: Path, batch_size: int | None) -> StudySamples:
    store = VolumeStore(workspace / "store")
    studies = studies_of(store.select("train"), read_reports(workspace / "store"))
    return StudySamples(
        store, studies, small_text_model().encode, patch_size=(16, 16, 16), spacing_mm=(4.0, 4.0, 4.0),
        window_hu=(-1000.0, 1000.0), shown="section", seed=0, batch_size=batch_size,
    )  # fmt: skip


def test_no_batch_shows_a_study_twice(workspace: Path) -> None:
    train = samples(workspace, 3)
    assert len(train.studies) == 5
    volumes = train.volumes_of(range(60))
    study = {volume: report.study for volume, report in read_reports(workspace / "store").items()}
    for start in range(0, 60, 3):
        assert len({study[volume] for volume in volumes[start : start + 3]}) == 3
    assert set(volumes) == {f"v{number}" for number in range(6)}  # both reconstructions, at times
    with pytest.raises(UserError, match=r"train.batch_size is 6, but 5 training studies have a report"):
        samples(workspace, 6)


def test_samples_depend_on_their_index_alone(workspace: Path) -> None:
    train, again, held_out = samples(workspace, 3), samples(workspace, 3), samples(workspace, None)
    for name, value in train[7].items():
        assert torch.equal(value, again[7][name])
    assert train[7]["image"].shape == (1, 16, 16, 16)
    report = read_reports(workspace / "store")[held_out.volumes_of([1])[0]]
    assert held_out[1]["report"] == held_out[1]["text"] == text_hash(report.findings)
    assert not torch.equal(train[0]["image"], train[5]["image"])


def test_damaged_reports_are_noticed_and_are_their_owners_alone(workspace: Path) -> None:
    path = workspace / "store" / "reports.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(path.read_text(encoding="utf-8").replace("liver", "river"), encoding="utf-8")
    with pytest.raises(UserError, match=r"reports.jsonl is damaged"):
        read_reports(workspace / "store")


def train(workspace: Path, *arguments: str) -> None:
    cli.main(["train", "--workspace", str(workspace), "--device", "cpu", *SETTINGS, *arguments])


@pytest.mark.parametrize("name", METHODS)
def test_from_reports_to_a_package_that_compares_images_and_texts(workspace: Path, name: str) -> None:
    train(workspace, "--method", name, "--run", "whole", "--steps", "5")
    train(workspace, "--method", name, "--run", "parts", "--steps", "2")
    resume = ["--workspace", str(workspace), "--device", "cpu", "--resume", "--run", "parts", "--steps", "5"]
    cli.main(["train", *resume])
    whole, parts = (read_checkpoint(workspace / "runs" / run / "checkpoints" / "last.pt") for run in ("whole", "parts"))
    assert all(torch.equal(value, parts["method"][key]) for key, value in whole["method"].items())
    record = read_json(workspace / "runs" / "whole" / "run.json")
    assert record["trained"] == ["encoder"]
    figures = read_metrics(workspace / "runs" / "whole", "val")[0]
    assert {"text_to_image", "image_to_text", "uniformity"} <= figures.keys()

    cli.main(["export", "--workspace", str(workspace), "--run", "whole", "--checkpoint", "last"])
    package = workspace / "weights" / "whole"
    pair = load_image_text(package)
    image = torch.rand(2, 1, 16, 16, 16)
    assert pair.embed_images(image).norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    texts = pair.embed_texts(["No lesion.", "Two lesions, left lung."])
    assert texts.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    similarity = pair.similarity(image, ["No lesion.", "Two lesions, left lung."])
    assert similarity.shape == (2, 2)
    assert similarity.abs().max() <= 1 + 1e-5
    if name == "convirt":
        torch.testing.assert_close(similarity, pair.embed_images(image) @ texts.T)
    state = pair.method.state_dict()
    for key, value in whole["method"].items():
        assert torch.equal(state[key], value), key
    with pytest.raises(UserError, match=r"has no words"):
        pair.embed_texts([" . "])
    for folder in (workspace / "runs", workspace / "weights"):
        for path in folder.rglob("*"):
            assert not path.is_file() or b"achariasson" not in path.read_bytes(), path

    (package / "text" / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        load_image_text(package)


@pytest.mark.slow
def test_two_ranks_equal_one_process(workspace: Path) -> None:
    arguments = ["--workspace", str(workspace), "--device", "cpu", "--method", "convirt", "--steps", "3", *SETTINGS]
    arguments += ["--set", "train.optimizer.name=sgd", "--set", "train.optimizer.learning_rate=0.1"]
    cli.main(["train", *arguments, "--run", "one"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*torchrun, "-m", "genesis.train", "--", "--run", "two", *arguments], check=True, env=environment, timeout=300
    )
    one, two = (read_checkpoint(workspace / "runs" / name / "checkpoints" / "last.pt") for name in ("one", "two"))
    start = load_start(workspace)
    moved = max(float((value - start[key]).abs().max()) for key, value in one["method"].items() if key in start)
    assert moved > 1e-3
    assert all(torch.allclose(value, two["method"][name], atol=1e-5) for name, value in one["method"].items())


def load_start(workspace: Path) -> dict[str, torch.Tensor]:
    """The text encoder's weights before training."""
    from safetensors.torch import load_file

    state = load_file(workspace / "runs" / "one" / "text" / "model.safetensors")
    return {f"text.network.{name}": value for name, value in state.items()}


def refused(capsys: pytest.CaptureFixture[str], workspace: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        train(workspace, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_a_user_is_told(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convirt = ("--method", "convirt", "--run", "a")
    message = refused(capsys, workspace, *convirt, "--set", "method.text.model=./nothing")
    assert "there is no folder ./nothing" in message
    assert not (workspace / "runs" / "a").exists()
    assert "set it to 1" in refused(capsys, workspace, *convirt, "--set", "train.accumulate=2")
    assert "method.text.lenght; did you mean length?" in refused(
        capsys, workspace, *convirt, "--set", "method.text.lenght=3"
    )
    assert "method.name: expected" in refused(capsys, workspace, *convirt, "--set", "method.name=x")
    assert "takes at most" not in refused(capsys, workspace, *convirt, "--set", "train.batch_size=8")
    train(workspace, *convirt, "--steps", "1")
    reports = read_reports(workspace / "store")
    write_reports(workspace / "store", {**reports, "v3": Report("s3", text="Another.")})
    with pytest.raises(SystemExit):
        cli.main(["train", "--workspace", str(workspace), "--resume", "--run", "a", "--steps", "2"])
    assert "The reports are others than when" in capsys.readouterr().err
    write_reports(workspace / "store", {})
    assert not (workspace / "store" / "reports.jsonl").exists()
    assert "No training volume in" in refused(capsys, workspace, "--method", "gloria", "--run", "b")
    shutil.rmtree(workspace / "store" / "volumes")
