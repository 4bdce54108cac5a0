"""Search by report and classes by prompts, with a tiny pair of encoders that nobody has trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import write_store
from torch import Tensor

from genesis.cli import main
from genesis.config import image_text_settings
from genesis.data.reports import Report, read_reports, write_reports
from genesis.data.sample_cohort import write_sample_cohort
from genesis.data.store import VolumeStore
from genesis.errors import UserError
from genesis.evaluation.image_text import Pair, both_ways, read_prompts, search_by_report, zero_shot
from genesis.evaluation.questions import Targets, questions
from genesis.evaluation.retrieval import retrieval
from genesis.methods import image_text_method
from genesis.models import build_backbone
from genesis.prepare import prepare
from genesis.text.encoders import own_text_model
from genesis.text.studies import studies_of
from genesis.weights import (
    CohortCard,
    DataCard,
    PretrainingCard,
    TextSide,
    load_image_text,
    write_package,
)
from genesis.workspace import Workspace

SPLITS = ("train",) * 4 + ("val",) * 2 + ("test",) * 4
DATA = DataCard(modality="ct", window_hu=(-1000, 1000), spacing_mm=(2.0, 2.0, 3.0), patch_size=(16, 16, 16))
TEXTS = ("A bright ball.", "A grey ball, secretly.", "No ball at all.", "Two balls, one of them grey.")
SETTINGS: dict[str, Any] = {
    "name": "convirt", "temperature": 0.1, "image_weight": 0.75, "projection": 16,
    "text": {"model": None, "revision": None, "shown": "section", "length": 16, "frozen_layers": None},
}  # fmt: skip


GLORIA = {"name": "gloria", "attention": "scaled", "regions": 512, "text": SETTINGS["text"]}


def write_pair(folder: Path, chosen: dict[str, Any] = SETTINGS) -> Path:
    """A package with a text side; its weights are as they were drawn."""
    torch.manual_seed(0)
    backbone = build_backbone("unet", spatial_dims=3, channels=(4, 8), strides=(2,), num_res_units=0)
    settings = image_text_settings(chosen)
    text = own_text_model({str(n): TEXTS for n in range(4)}, length=16, seed=0)
    method = image_text_method(settings, backbone, text, DATA.patch_size)
    write_package(
        folder,
        backbone,
        data=DATA,
        trained=("encoder",),
        pretraining=PretrainingCard(
            method=chosen["name"], steps=1, seed=0, metrics={}, cohort=CohortCard(patients=(), volumes=())
        ),
        text=TextSide(settings.model_dump(mode="json"), method),
    )
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    store = write_store(folder / "store", SPLITS)
    write_reports(
        folder / "store",
        {m.volume: Report(f"s{n}", TEXTS[n % 4], "Seen again." * (n % 2)) for n, m in enumerate(store)},
    )
    write_pair(folder / "weights" / "pair")
    write_pair(folder / "weights" / "gloria", GLORIA)
    (folder / "prompts.yaml").write_text("0: [No ball at all., Empty.]\n1: [A bright ball.]\n", encoding="utf-8")
    return folder


def evaluate(workspace: Path, *arguments: str) -> None:
    main(["evaluate", "--workspace", str(workspace), "--device", "cpu", *arguments])


def refused(workspace: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        evaluate(workspace, *arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


class Told:
    """Stands in for the encoders: an image is its number in the order it is shown, a text is its length."""

    data = DATA

    def __init__(self) -> None:
        self.shown = 0

    def similarity(self, images: Tensor, texts: list[str]) -> Tensor:
        numbers = torch.arange(self.shown, self.shown + len(images))
        self.shown += len(images)
        return torch.tensor([[float(len(text)) * (1 + number) for text in texts] for number in numbers])


def test_a_group_of_texts_counts_as_their_mean_and_images_keep_their_order(workspace: Path) -> None:
    store = write_store(workspace / "store", SPLITS)
    pair = Pair(Told(), store)  # type: ignore[arg-type]
    similarity = pair.similarity(list(store), [["a", "abc"], ["abcd"]], "title")
    assert similarity.shape == (10, 2)
    torch.testing.assert_close(similarity, torch.arange(1, 11)[:, None] * torch.tensor([2.0, 4.0]))


def test_reports_are_relevant_to_their_own_study_and_to_equal_ones(workspace: Path) -> None:
    store = write_store(workspace / "store", SPLITS)
    metas = store.select("test")
    reports = {m.volume: Report(f"s{n}", ("One.", "Two.", "ONE", "Three.")[n]) for n, m in enumerate(metas)}
    _, relevant = search_by_report(Pair(Told(), store), studies_of(metas, reports))  # type: ignore[arg-type]
    assert relevant["its own report"].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert relevant["a report of the same target"].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]] * 2


def test_directions_are_not_confused() -> None:
    similarity = torch.tensor([[0.9, 0.8], [0.1, 0.7]])  # both reports prefer image 0, each image its own report
    found = both_ways(similarity, torch.eye(2, dtype=torch.bool))
    assert found["text to image"]["precision@1"] == 0.5
    assert found["image to text"]["precision@1"] == 1.0


def test_the_class_of_the_most_similar_prompts_wins(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(workspace / "store", SPLITS)
    question = next(one for one in questions(store, DATA) if isinstance(one, Targets))
    target = torch.tensor([meta.target for meta in question.metas("test")])
    truth = torch.nn.functional.one_hot(target, 2) + 0.0
    monkeypatch.setattr(Pair, "similarity", lambda *_: truth)
    assert zero_shot(Pair(Told(), store), question, [["a"], ["b"]]) == {  # type: ignore[arg-type]
        "AUC": 1.0, "AUC/0": 1.0, "AUC/1": 1.0, "accuracy": 1.0,
    }  # fmt: skip


def test_retrieval_and_zero_shot_write_answers_without_a_word_of_the_reports(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(workspace, "--task", "retrieval", "--weights", "pair", "--control", "none")
    folder = workspace / "evaluations" / "retrieval-pair-on-store"
    answers = json.loads((folder / "results.json").read_text(encoding="utf-8"))["answers"]
    asked = [answer["question"] for answer in answers]
    assert asked[2:4] == ["text to image, its own report", "image to text, its own report"]
    assert all("secretly" not in file.read_text(encoding="utf-8") for file in folder.glob("results.*"))
    assert len(list((folder / "figures").iterdir())) == 4
    evaluate(workspace, "--task", "zero_shot", "--weights", "pair", "--prompts", str(workspace / "prompts.yaml"))
    text = (workspace / "evaluations" / "zero_shot-pair-on-store" / "results.md").read_text(encoding="utf-8")
    assert "| AUC | AUC/0 | AUC/1 | accuracy |" in text
    assert "secretly" not in capsys.readouterr().out


def test_gloria_shows_where_the_words_of_a_prompt_look(workspace: Path) -> None:
    pair = load_image_text(workspace / "weights" / "gloria")
    looks = Pair(pair, write_store(workspace / "store", SPLITS)).looks
    meta = VolumeStore(workspace / "store").select("test")[0]
    found = looks(meta, "A bright ball, not a grey ball.")
    assert [look.word for look in found] == ["A", "bright", "ball", "not", "a", "grey", "ball"]
    assert all(look.attention.max() == 1 and look.attention.shape == look.image.shape == (16, 16) for look in found)
    with pytest.raises(UserError, match="of gloria alone"):
        load_image_text(workspace / "weights" / "pair").attention(torch.rand(1, 1, 16, 16, 16), "A ball.")
    prompts = ("--task", "zero_shot", "--weights", "gloria", "--prompts", str(workspace / "prompts.yaml"))
    evaluate(workspace, *prompts)
    folder = workspace / "evaluations" / "zero_shot-gloria-on-store"
    assert (folder / "figures" / "attention.png").is_file()
    assert "](figures/attention.png)" in (folder / "results.md").read_text(encoding="utf-8")


def test_its_encoder_is_shown_whole_bodies(workspace: Path) -> None:
    from genesis.data.labelled import body_image
    from genesis.evaluation.embedding import FrozenEncoder

    store = write_store(workspace / "store", SPLITS)
    encoder = FrozenEncoder.of(workspace / "weights" / "pair", torch.device("cpu"))
    image = body_image(store, store["v01"].meta, DATA.patch_size, DATA.spacing_mm, (-1000.0, 1000.0), None)
    torch.testing.assert_close(encoder.embed(store["v01"]), encoder.encode(image[None])[0])
    pair = load_image_text(workspace / "weights" / "pair")
    assert pair.embed_images(image[None]).shape == (1, 16)


def test_the_example_prompts_are_for_the_targets_of_the_sample() -> None:
    prompts = read_prompts(Path(__file__).parent.parent / "examples" / "prompts_sample.yaml", (0, 1))
    assert [len(texts) for texts in prompts] == [3, 5]


def test_prompts_that_cannot_be_used(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(text: str, name: str = "prompts.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as error:
            read_prompts(tmp_path / name, (0, 1))
        return str(error.value)

    assert "1 has no prompts" in said("0: [a]")
    assert "lesion is no target" in said("0: [a]\n1: [b]\nlesion: [c]")
    assert "target 1 has no list" in said("0: [a]\n1: b")
    assert "target 1 has no list" in said("0: [a]\n1: []")
    assert "expected a mapping" in said("- a\n- b")
    assert "cannot be read" in said("0: [a")
    assert "cannot be read" in said("{0: 1}", "prompts.json")
    zero_shot = ("--task", "zero_shot", "--weights", "pair")
    assert "needs --prompts" in refused(workspace, capsys, *zero_shot)
    assert "does not exist" in refused(workspace, capsys, *zero_shot, "--prompts", str(tmp_path / "nothing.yaml"))
    assert "belongs to --task zero_shot" in refused(workspace, capsys, "--task", "probe", "--prompts", "x.yaml")
    (tmp_path / "wordless.yaml").write_text("0: ['...']\n1: [a]", encoding="utf-8")
    assert "no words" in refused(workspace, capsys, *zero_shot, "--prompts", str(tmp_path / "wordless.yaml"))


def test_a_package_without_texts_is_refused_before_anything_is_read(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = build_backbone("unet", spatial_dims=3, channels=(4, 8), strides=(2,), num_res_units=0)
    seen = PretrainingCard(method="inpainting", steps=1, seed=0, metrics={}, cohort=CohortCard(patients=(), volumes=()))
    write_package(workspace / "weights" / "mute", backbone, data=DATA, pretraining=seen)
    where = ("--weights", "mute", "--data", "nowhere", "--prompts", str(workspace / "prompts.yaml"))
    assert "has no text encoder" in refused(workspace, capsys, "--task", "zero_shot", *where)


@pytest.mark.slow
def test_a_few_minutes_of_convirt_find_images_by_what_a_text_says(tmp_path: Path) -> None:
    """Text to image as ConVIRT has it (section 4.3): queries for a category, relevant is every image of it.

    On the sample cohort with more patients, shown coarsely and in a soft-tissue window, so that minutes are enough. Six
    categories that a phantom shows as a whole: three of contrast agent, three of build.
    """
    workspace, folder = Workspace(tmp_path), ("--workspace", str(tmp_path))
    data = write_sample_cohort(workspace.sample, patients=320)
    prepare(data, workspace.store, workspace, modality="ct", sample=True)
    settings = ("data.patch_size=[24,24,24]", "data.window_hu=[-200,300]", "train.batch_size=16", "train.steps=450")
    changes = [part for setting in (*settings, "train.patience=100") for part in ("--set", setting)]
    main(["train", "--method", "convirt", *changes, *folder, "--device", "cpu"])
    main(["export", *folder])
    wordings = (
        ("without contrast agent", "unenhanced, no contrast agent given"),
        ("with faint enhancement by contrast agent", "contrast agent given, faint enhancement"),
        ("with strong enhancement by contrast agent", "contrast agent given, strong enhancement"),
        ("slim build",), ("normal build",), ("obese build",),
    )  # fmt: skip
    store = VolumeStore(workspace.store)
    metas, reports = store.select("test"), read_reports(workspace.store)
    relevant = torch.tensor(
        [[any(w in reports[meta.volume].impression for w in words) for words in wordings] for meta in metas]
    )
    queries = [[f"CT, {words}." for words in one] for one in wordings]
    similarity = Pair(load_image_text(workspace.weights / "convirt_3d"), store).similarity(metas, queries, "asking")
    found = retrieval(similarity.T, relevant.T)
    assert found["precision@5"] > 1.5 * found["chance"]  # 0.63 to 0.70 over seeds and numbers of threads; chance 0.33
