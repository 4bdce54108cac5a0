"""Every shipped recipe at a tiny size: a short recorded loss trace, and a training from the store to the pictures."""

import contextlib
from pathlib import Path

import pytest
import torch
from reports_cohort import TEXTS, report_batch, small_text_model
from test_semantic_genesis import CLASSES, patches
from test_train import train, workspace  # noqa: F401  a fixture

from genesis.config import ViewMethodConfig, load_config, recipes
from genesis.data.reports import Report, write_reports
from genesis.engine.monitor import read_metrics
from genesis.engine.optimizer import OptimizerSettings
from genesis.files import read_json
from genesis.methods import METHODS, Facts
from genesis.models import build_backbone

SMALL = {
    (3, "unet"): ["data.patch_size=[24,24,16]", "network.channels=[4,8,16]", "network.strides=[2,2]"],
    (3, "published_unet"): ["data.patch_size=[16,8,8]"],
    (2, "flexible_unet"): ["data.patch_size=[64,64]"],
    (2, "unet"): ["data.patch_size=[32,32]", "network.channels=[4,8,16]", "network.strides=[2,2]"],
}
SIZES = [part for size in ("data.patch_size=[16,16,16]", "data.spacing_mm=median") for part in ("--set", size)]
OTHER_SIZES = {
    "swav": ["--set", "method.views.local_size=[8,8,8]"],
    "online_clustering": ["--set", "method.views.local_size=[8,8,8]", "--set", "method.prototypes.per=shared"],
}
TRACES = {
    "autoencoder_2d": [0.30841, 0.13817, 0.07692],
    "autoencoder_3d": [0.16057, 0.14239, 0.13013],
    "classification_only_2d": [1.19161, 5.54314, 2.12413],
    "classification_only_3d": [1.11406, 1.07745, 1.13657],
    "convirt_2d": [1.38674, 1.38196, 1.39181],
    "convirt_3d": [1.39674, 1.38717, 1.39112],
    "gloria_2d": [9.40635, 9.28319, 9.02001],
    "gloria_3d": [8.5, 8.40947, 8.2019],
    "inpainting_2d": [0.28624, 0.13699, 0.07853],
    "inpainting_3d": [0.15969, 0.1438, 0.13063],
    "models_genesis_2d": [0.31076, 0.21383, 0.19492],
    "models_genesis_3d": [0.17413, 0.15723, 0.15288],
    "moco_v2_2d": [6.20698, 7.55672, 6.6878],
    "moco_v2_3d": [4.82084, 6.13302, 5.30201],
    "online_clustering_2d": [7.20876, 7.19002, 7.213],
    "online_clustering_3d": [6.04809, 5.98813, 5.88972],
    "patch_shuffling_2d": [0.30737, 0.13015, 0.0767],
    "patch_shuffling_3d": [0.16075, 0.14439, 0.13206],
    "semantic_genesis_2d": [0.32267, 0.26871, 0.21498],
    "semantic_genesis_3d": [0.18527, 0.16804, 0.16422],
    "semantic_genesis_3d_published": [0.19423, 0.1781, 0.14118],
    "simclr_2d": [1.90669, 1.9619, 1.94942],
    "simclr_3d": [1.93756, 1.94047, 1.93913],
    "swav_2d": [7.20688, 7.25431, 7.17133],
    "swav_3d": [6.04557, 6.01792, 5.93711],
}


@pytest.mark.parametrize("name", recipes())
def test_recorded_loss_trace(name: str) -> None:
    """The numerics of a recipe: a change here belongs into the CHANGELOG."""
    config = load_config(name)
    small = SMALL[config.spatial_dims, config.network.name]
    text = small_text_model() if config.method.needs == "reports" else None
    config = load_config(name, [*small, "train.optimizer.warmup_steps=0"])
    torch.manual_seed(0)
    backbone = build_backbone(spatial_dims=config.spatial_dims, **config.network.model_dump())
    facts = Facts(classes=CLASSES, modalities=("ct", "mr"), text=text)
    method = METHODS[config.method.name](config, backbone, facts).train()
    settings = OptimizerSettings(**config.train.optimizer.model_dump())
    optimizer = settings.build(method.param_groups())
    views = config.method.views if isinstance(config.method, ViewMethodConfig) else None
    size = views.region(config.data.patch_size) if views else config.data.patch_size
    trace = []
    for step in range(3):
        settings.set_rate(optimizer, step, config.train.steps)
        if text is not None:
            output = method(report_batch(text, TEXTS, config.data.patch_size, first=4 * step))
        else:
            output = method({**patches(4, size, first=4 * step), "modality": torch.zeros(4, dtype=torch.long)})
        loss = torch.stack(list(output.losses.values())).sum()
        loss.backward()
        assert all(weight.grad is not None for weight in method.parameters() if weight.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        method.after_optimizer_step(step)
        trace.append(loss.item())
    assert trace == pytest.approx(TRACES[name], rel=2e-2)


@pytest.mark.parametrize("name", ["models_genesis", "inpainting", "patch_shuffling", "autoencoder"])
def test_semantics_adds_the_classification_of_pseudo_labels(name: str) -> None:
    """The pairs of the published ablation (Haghighi 2020, figure 6)."""
    small = SMALL[3, "unet"]
    losses = []
    for semantics in ("false", "true"):
        config = load_config(f"{name}_3d", [*small, f"method.semantics={semantics}"])
        torch.manual_seed(0)
        backbone = build_backbone(spatial_dims=3, **config.network.model_dump())
        method = METHODS[name](config, backbone, Facts(classes=CLASSES if semantics == "true" else 0))
        losses.append(method(patches(4, config.data.patch_size)).losses)
        assert config.method.needs == ("pseudo_labels" if semantics == "true" else "patches")
    assert set(losses[1]) - set(losses[0]) == {"classification"}
    assert losses[1]["restoration"].item() == pytest.approx(losses[0]["restoration"].item())


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_from_the_store(workspace: Path, name: str) -> None:  # noqa: F811
    if load_config(f"{name}_3d").method.needs == "reports":
        reports = {f"v{number}": Report(f"s{number}", text=TEXTS[number % 4]) for number in range(8)}
        write_reports(workspace / "store", reports)
    train(workspace, "--method", name, "--run", name, "--steps", "4", *SIZES, *OTHER_SIZES.get(name, ()))
    folder = workspace / "runs" / name
    assert read_json(folder / "run.json")["status"] == "finished"
    assert read_metrics(folder, "val")[-1]["loss"] >= 0  # of one study alone there is nothing to tell apart
    assert (folder / "figures" / "learning_curves.png").is_file()


def test_reports_of_another_language_than_the_text_model(
    workspace: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_text_model().write(tmp_path / "text")
    write_reports(workspace / "store", {f"v{n}": Report(f"s{n}", text="肝臓 が 腫大 して いる") for n in range(8)})
    settings = (f"method.text.model={tmp_path / 'text'}", "method.text.length=24")
    changes = [part for setting in settings for part in ("--set", setting)]
    with pytest.raises(SystemExit) as end:
        train(workspace, "--method", "convirt", "--steps", "4", *SIZES, *changes)
    assert end.value.code == 2
    assert "does not fit these reports: it lacks 100% of their words" in capsys.readouterr().err


def test_models_genesis_at_the_published_learning_rate_raises_an_alarm(workspace: Path) -> None:  # noqa: F811
    """SGD at 1 ruins it (METHODS 2), the recipe's AdamW does not."""
    ruinous = ["train.optimizer.name=sgd", "train.optimizer.learning_rate=1", "train.optimizer.warmup_steps=0"]
    how = ("--method", "models_genesis", "--steps", "60", *SIZES, "--set", "train.validate_every=10")
    train(workspace, *how, "--run", "sound")
    with contextlib.suppress(SystemExit):
        train(workspace, *how, "--run", "ruined", *(part for change in ruinous for part in ("--set", change)))
    sound, ruined = (read_metrics(workspace / "runs" / run, "alarm") for run in ("sound", "ruined"))
    assert "not_finite" in {alarm["kind"] for alarm in ruined} - {alarm["kind"] for alarm in sound}
