"""Every shipped recipe at a tiny size: a short recorded loss trace, and a training from the store to the pictures."""

import contextlib
from pathlib import Path

import pytest
import torch
from blobs import write_store as write_blobs
from reports_cohort import TEXTS, report_batch, small_text_model
from test_finetune import SETTINGS as FINE_TUNING
from test_semantic_genesis import CLASSES, patches
from test_train import DATA, make_discovery, make_store, train, workspace  # noqa: F401  a fixture

from genesis.cli import main
from genesis.config import ViewMethodConfig, load_config, recipes
from genesis.data.reports import Report, write_reports
from genesis.engine.monitor import read_metrics
from genesis.engine.optimizer import OptimizerSettings
from genesis.files import read_json
from genesis.methods import METHODS, Facts
from genesis.models import build_backbone
from genesis.weights import read_card

SMALL = {
    (3, "unet"): ["data.patch_size=[24,24,16]", "network.channels=[4,8,16]", "network.strides=[2,2]"],
    (3, "published_unet"): ["data.patch_size=[16,8,8]"],
    (2, "flexible_unet"): ["data.patch_size=[64,64]"],
    (2, "unet"): ["data.patch_size=[32,32]", "network.channels=[4,8,16]", "network.strides=[2,2]"],
}
SIZES = [part for size in ("data.patch_size=[16,16,16]", "data.spacing_mm=median") for part in ("--set", size)]
OTHER_SIZES = {
    "patch_shuffling": ["--set", "data.patch_size=[20,20,20]"],
    "swav": ["--set", "method.views.local_size=[8,8,8]"],
    "online_clustering": ["--set", "method.views.local_size=[8,8,8]", "--set", "method.prototypes.per=shared"],
}
TRACES = {
    "autoencoder_2d": [0.30841, 0.13817, 0.076918, 7.2974, 3.1754, 1.7354],
    "autoencoder_3d": [0.16057, 0.14239, 0.13013, 1.0532, 0.93221, 0.84144],
    "classification_only_2d": [1.1992, 5.649, 2.2988, 14.185, 21.139, 15.551],
    "classification_only_3d": [1.1115, 1.0786, 1.1356, 0.67232, 0.54512, 0.72246],
    "convirt_2d": [1.3814, 1.3834, 1.4158, 1.2206, 1.0432, 1.2714],
    "convirt_3d": [1.4023, 1.3894, 1.3951, 1.1961, 0.74878, 0.86138],
    "gloria_2d": [9.4473, 9.3128, 9.0185, 41.763, 41.714, 40.174],
    "gloria_3d": [8.4727, 8.4095, 8.0614, 46.427, 46.062, 44.883],
    "inpainting_2d": [0.28624, 0.13699, 0.078532, 5.5637, 1.9528, 1.2257],
    "inpainting_3d": [0.15969, 0.1438, 0.13063, 1.0534, 0.9481, 0.85363],
    "moco_v2_2d": [6.207, 7.5567, 6.6878, 1.9553, 15.773, 8.5302],
    "moco_v2_3d": [4.8208, 6.133, 5.302, 0.78826, 16.108, 8.584],
    "models_genesis_2d": [0.30616, 0.21765, 0.19822, 5.2927, 2.2134, 2.5429],
    "models_genesis_3d": [0.17398, 0.15722, 0.15304, 1.0999, 1.0039, 0.93494],
    "online_clustering_2d": [7.2088, 7.19, 7.213, 1.7374, 1.0919, 1.155],
    "online_clustering_3d": [6.0481, 5.9881, 5.8897, 2.2158, 1.6951, 1.2859],
    "patch_shuffling_2d": [0.29678, 0.13196, 0.084019, 6.5453, 2.3607, 1.5699],
    "patch_shuffling_3d": [0.16119, 0.14418, 0.13211, 1.0589, 0.95392, 0.86426],
    "semantic_genesis_2d": [0.31816, 0.27452, 0.21992, 5.2974, 2.2366, 2.5394],
    "semantic_genesis_3d": [0.1851, 0.168, 0.16436, 1.0999, 1.0038, 0.93499],
    "semantic_genesis_3d_published": [0.19423, 0.1781, 0.14118, 1.0864, 0.63863, 0.46973],
    "simclr_2d": [1.9067, 1.9619, 1.9494, 1.7733, 0.70603, 0.1021],
    "simclr_3d": [1.9376, 1.9405, 1.9391, 0.69957, 1.0878, 1.3733],
    "swav_2d": [7.2069, 7.2543, 7.1713, 1.7233, 1.3093, 0.88193],
    "swav_3d": [6.0456, 6.0179, 5.9371, 2.1005, 1.6655, 0.97963],
}


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


@pytest.mark.parametrize("name", recipes())
def test_recorded_loss_trace(name: str) -> None:
    """The numerics of a recipe: a change here belongs into the CHANGELOG.

    Losses of three steps, then the norms of their gradients: those tell where a loss is near that of a guess.
    """
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
    losses, norms = [], []
    for step in range(3):
        settings.set_rate(optimizer, step, config.train.steps)
        if text is not None:
            batch = report_batch(text, TEXTS, config.data.patch_size, first=4 * step)
        else:
            batch = {**patches(4, size, first=4 * step), "modality": torch.zeros(4, dtype=torch.long)}
        output = method(method.prepare(batch))
        loss = torch.stack(list(output.losses.values())).sum()
        loss.backward()
        assert all(weight.grad is not None for weight in method.parameters() if weight.requires_grad)
        gradients = [weight.grad for weight in method.parameters() if weight.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        optimizer.step()
        optimizer.zero_grad()
        method.after_optimizer_step(step)
        losses.append(loss.item())
    assert [*losses, *norms] == pytest.approx(TRACES[name], rel=5e-2)


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
        losses.append(method(method.prepare(patches(4, config.data.patch_size))).losses)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_on_slices(tmp_path: Path, name: str) -> None:
    """By the verbs, as a user would, with discovery where a method needs it."""
    store = write_blobs(tmp_path / "store", ("train",) * 6 + ("val",) * 2 + ("test",))
    recipe = load_config(f"{name}_2d")
    kind = recipe.method.needs
    if kind == "reports":
        texts = {meta.volume: Report(meta.volume, text=TEXTS[number % 4]) for number, meta in enumerate(store)}
        write_reports(tmp_path / "store", texts)
    where = ("--dim", "2d", "--workspace", str(tmp_path), "--device", "cpu")
    data, network = ["data.patch_size=[16,16]"], ["network.channels=[4,8]", "network.strides=[2]"]
    if recipe.network.name == "flexible_unet":  # of which one position of the bottleneck is 32 pixels
        data, network = ["data.patch_size=[64,64]", "data.spacing_mm=[0.5,0.5]"], []
    if kind == "pseudo_labels":
        sizes = ["autoencoder.steps=4", "autoencoder.shape=[16,16]", "autoencoder.channels=[4,8]", "classes=3"]
        sizes += ["autoencoder.batch_size=4", "neighbours=4", "validation_neighbours=2", "min_tissue=0"]
        main(["discover", *where, *sets(*data, *(f"discovery.{size}" for size in sizes))])
        data = []  # they are those of discovery
    local = ["method.views.local_size=[8,8]"] if name in ("swav", "online_clustering") else []
    shared = ["method.prototypes.per=shared"] if name == "online_clustering" else []
    short = ["train.batch_size=4", "train.validate_every=2", "train.validation_samples=4", "train.workers=0"]
    main(["train", "--method", name, "--steps", "4", *where, *sets(*data, *network, *local, *shared, *short)])
    (run,) = (tmp_path / "runs").iterdir()
    assert read_json(run / "run.json")["status"] == "finished"
    main(["export", "--workspace", str(tmp_path)])
    assert read_card(tmp_path / "weights" / run.name).pretraining.method == name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["models_genesis", "moco_v2", "online_clustering", "gloria"])
def test_it_is_fine_tuned(tmp_path: Path, name: str) -> None:
    """Like Semantic Genesis: a segmentation of the volumes of test patients, beside one that began untrained."""
    store = write_blobs(tmp_path / "store", ("train",) * 6 + ("val",) * 2 + ("test",) * 2)
    texts = {meta.volume: Report(meta.volume, text=TEXTS[number % 4]) for number, meta in enumerate(store)}
    write_reports(tmp_path / "store", texts)
    where = ("--workspace", str(tmp_path), "--device", "cpu")
    small = ["data.patch_size=[16,16,16]", "network.channels=[4,8]", "network.strides=[2]", "train.batch_size=4"]
    small += ["train.validate_every=2", "train.validation_samples=4", "train.workers=0"]
    others = OTHER_SIZES.get(name, [])
    main(["train", "--dim", "3d", "--method", name, "--steps", "4", *where, *sets(*small), *others])
    main(["export", *where[:2]])
    main(["finetune", "--labels", "2", *where, *sets(*FINE_TUNING)])
    (results,) = tmp_path.rglob("results.json")
    assert {"pretrained", "scratch"} <= {score["arm"] for score in read_json(results)["scores"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["models_genesis", "inpainting", "patch_shuffling", "autoencoder"])
def test_semantics_is_trained_by_the_verb(tmp_path: Path, name: str) -> None:
    make_store(tmp_path / "store")
    make_discovery(tmp_path / "discovery" / "3d", {**DATA, "patch_size": [20, 20, 20]})
    train(tmp_path, "--method", name, "--steps", "4", *sets("method.semantics=true"))
    figures = read_metrics(tmp_path / "runs" / f"{name}_3d", "val")[-1]
    assert {"mse", "accuracy"} <= figures.keys()


def test_patches_too_small_to_shuffle(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with pytest.raises(SystemExit) as end:
        train(workspace, "--method", "patch_shuffling", "--steps", "4", *SIZES)
    assert end.value.code == 2
    assert "data.patch_size [16, 16, 16]: nothing would be shuffled" in capsys.readouterr().err


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
