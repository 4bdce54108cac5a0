"""An experiment with arms that differ in their initial weights alone.

At each number of labelled cases every arm gets the same steps, cases, data order, augmentations and schedule. Its
learning rate is the best of the same few on the validation cases with the first seed; the other seeds take it over.
Test cases are read only after that, once per trained model.

Every trained model is a folder ARM/N-labels/seed-S/lr-R of the run; a finished one is kept when the same command is
repeated, an interrupted one goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import float_info

import numpy as np
import torch

from ..config import FinetuneConfig
from ..engine.checkpoint import read_checkpoint
from ..engine.method import Method
from ..engine.optimizer import OptimizerSettings
from ..engine.trainer import fit
from ..errors import TrainingAlarm
from ..files import read_json, write_aside, write_json
from ..models import Backbone, build_described
from ..seeding import key
from ..weights import Card, CohortCard, SeenVolume, TaskCard, load_into, write_package
from .cases import Splits, choose
from .comparison import Score
from .tasks import Task

PRETRAINED, SCRATCH = "pretrained", "scratch"


@dataclass(frozen=True)
class Experiment:
    """`package`: the weights of the pretrained arm, `card` theirs. `in_channels`: of the labelled data."""

    folder: Path
    task: Task
    splits: Splits
    package: Path
    card: Card
    in_channels: int
    settings: FinetuneConfig
    device: torch.device
    id_key_hash: str
    overlap: tuple[str, ...] = ()  # test cases that pretraining saw, and how that is known

    def run(self, arms: Sequence[str], counts: Sequence[int], seeds: Sequence[int]) -> list[Score]:
        """Train and test every arm at every number of labelled cases with every seed."""
        scores = []
        for labels in sorted(counts):
            for arm in arms:
                rate = self._best_rate(arm, labels, seeds[0])
                scores += [self._score(arm, labels, seed, rate) for seed in seeds]
        return scores

    def sub_run(self, arm: str, labels: int, seed: int, rate: float) -> Path:
        return self.folder / arm / f"{labels}-labels" / f"seed-{seed}" / f"lr-{rate:g}"

    def rates(self, arm: str, labels: int, seed: int) -> dict[float, float]:
        """Learning rate → validation loss, of the first seed, once `run` has been there."""
        runs = {rate: self.sub_run(arm, labels, seed, rate) for rate in self.settings.learning_rates}
        return {rate: read_json(run / "trained.json")["loss"] for rate, run in runs.items()}

    def write_model(self, folder: Path, score: Score) -> None:
        """The weights package of one trained model, for `predict`."""
        backbone, method = self._trained(score.arm, score.labels, score.seed, score.learning_rate)
        cohort = self.card.pretraining.cohort
        seen = (*self.splits.train, *self.splits.validation)
        both = {one.content: one for one in (*SeenVolume.of(seen), *cohort.seen)}
        cohort = cohort.model_copy(update={"seen": tuple(both.values())})
        if cohort.key in (None, self.id_key_hash):  # hashes of two keys in one list could not be told apart
            cohort = CohortCard(
                key=self.id_key_hash,
                patients=tuple(sorted({*cohort.patients, *(meta.patient for meta in seen)})),
                volumes=tuple(sorted({*cohort.volumes, *(meta.volume for meta in seen)})),
                seen=cohort.seen,
            )
        write_package(
            folder,
            backbone,
            data=self.card.data.model_copy(
                update={
                    "modality": self.splits.train[0].modality,
                    "window_hu": self.task.window_hu,
                    "spacing_mm": self.task.spacing_mm,
                    "patch_size": self.task.patch_size,
                }
            ),
            pretraining=self.card.pretraining.model_copy(update={"cohort": cohort}),
            trained=self.task.trained,
            task=TaskCard(type=self.task.kind, labels=self.task.outputs),
            head=self.task.head(method),
        )

    def _best_rate(self, arm: str, labels: int, seed: int) -> float:
        for rate in self.settings.learning_rates:
            try:
                self._train(arm, labels, seed, rate)
            except TrainingAlarm as alarm:
                if alarm.kind != "not_finite" or len(self.settings.learning_rates) == 1:
                    raise
                lost = {"loss": float_info.max, "step": 0}  # this rate is too high, which the others need not be
                write_json(self.sub_run(arm, labels, seed, rate) / "trained.json", lost)
        losses = self.rates(arm, labels, seed)
        best = min(losses, key=lambda rate: losses[rate])
        if len(losses) > 1:
            tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
            print(f"{arm}, {labels} labelled cases: learning rate {best:g} (validation loss at {tried}).")
            if len(losses) > 2 and best in (min(losses), max(losses)):
                print("It is at the edge of those tried; a better one may lie beyond (finetune.learning_rates).")
        return best

    def _train(self, arm: str, labels: int, seed: int, rate: float) -> None:
        folder = self.sub_run(arm, labels, seed, rate)
        if (folder / "trained.json").exists():
            _forget_progress(folder)  # killed, perhaps, before it could
            return
        settings = self.settings
        cases = choose(self.splits.train, labels, seed)
        result = fit(
            self._model(arm, seed)[1],
            self.task.training(cases, seed),
            validation=self.task.validation(self.splits.validation),
            validation_batch_size=1,
            folder=folder,
            seed=seed,
            device=self.device.type,
            steps=settings.steps,
            batch_size=settings.batch_size,
            optimizer=OptimizerSettings(
                "adamw", rate, settings.weight_decay, schedule="cosine", warmup_steps=settings.warmup_steps
            ),
            validate_every=settings.validate_every,
            workers=settings.workers,
            resume=True,
            title=f"{arm}, {labels} labelled cases, seed {seed}, learning rate {rate:g}",
        )
        loss = min(result.best_loss, float_info.max)  # JSON knows no infinity, which a diverged training has
        write_json(folder / "trained.json", {"loss": loss, "step": result.best_step}, sealed=True)
        _forget_progress(folder)

    def _score(self, arm: str, labels: int, seed: int, rate: float) -> Score:
        self._train(arm, labels, seed, rate)
        folder = self.sub_run(arm, labels, seed, rate)
        if not (folder / "test.json").exists():
            _, method = self._trained(arm, labels, seed, rate)
            tested = self.task.test(method, self.splits.test, self.device)
            with write_aside(folder / "slices.npz") as aside, aside.open("wb") as stream:
                np.savez_compressed(stream, **tested.slices)  # type: ignore[arg-type]
            write_json(folder / "test.json", {"values": tested.values, "cases": tested.cases}, sealed=True)
        validation = read_json(folder / "trained.json")["loss"]
        return Score(arm, labels, seed, rate, validation, read_json(folder / "test.json")["values"])

    def _model(self, arm: str, seed: int) -> tuple[Backbone, Method]:
        """Initial weights depend on the seed alone; those of the pretrained arm are then loaded over them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "initial weights"))
            network = self.card.network.model_dump(by_alias=True)
            backbone = build_described(network, in_channels=self.in_channels, logits=self.task.logits)
            method = self.task.method(backbone)
        if arm == PRETRAINED:
            load_into(backbone.network, self.package, quiet=True)
        return backbone, method

    def _trained(self, arm: str, labels: int, seed: int, rate: float) -> tuple[Backbone, Method]:
        """With the weights of the best validation, in eval mode."""
        backbone, method = self._model(arm, seed)
        checkpoint = self.sub_run(arm, labels, seed, rate) / "checkpoints" / "best.pt"
        method.load_state_dict(read_checkpoint(checkpoint)["method"])
        return backbone, method.to(self.device).eval()


def _forget_progress(folder: Path) -> None:
    """Of a finished training only the best checkpoint is wanted."""
    for name in ("last.pt", "previous.pt"):
        (folder / "checkpoints" / name).unlink(missing_ok=True)
