"""Ask a pretrained encoder what it knows, without training it further.

    python -m genesis.evaluate --task probe     --weights NAME --data D/dataset.json --labels 1% 10% 100% --seeds 0 1 2
    python -m genesis.evaluate --task retrieval --weights NAME --data D/dataset.json
    python -m genesis.evaluate --task zero_shot --weights NAME --data D/dataset.json --prompts PROMPTS.yaml

probe: a linear probe and nearest neighbours on frozen features, from so many labelled training cases; judged on test
cases by accuracy and the area under the ROC curve. retrieval: each test item searches among the others; precision@k is
the share of relevant ones among the k nearest, recall@k the share of all relevant ones that is found there; with the
weights of convirt or gloria, reports search for images, too, and images for reports. zero_shot, for such weights alone:
a scan's class is that whose prompts resemble it most; PROMPTS maps each target to a list of texts. With the weights of
gloria it also pictures where in a scan the words of a prompt look.

What is asked follows from the labels: with targets (a CSV's column target), which target a scan has; with label maps,
which organ is at the centre of a patch. The control is an untrained encoder of the same network, drawn anew with every
seed. Labelled scans come as for finetune, split by patient, and test cases that pretraining has seen are refused.

Results are in evaluations/NAME of the workspace: results.md, results.json and pictures.
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .data.store import VolumeStore
from .downstream import add_scan_arguments, chosen_package, labelled_store
from .engine.launch import launch
from .errors import UserError
from .evaluation.answers import Answer, write_answers
from .evaluation.arms import PRETRAINED, SCRATCH
from .evaluation.asking import Asked, Reports, probed, prompted, searched, searched_by_report
from .evaluation.cases import Splits, report_cases, training_counts
from .evaluation.frozen import Encoders
from .evaluation.image_text import Pair, reported
from .evaluation.questions import Question, Targets, questions
from .files import sha256, write_folder_aside
from .weights import has_text_side, load_image_text, read_card
from .workspace import Workspace

Overlap = tuple[str, ...]  # test cases that pretraining saw

TASKS = ("probe", "retrieval", "zero_shot")
PERCENTAGES = ("1%", "10%", "100%")
NEEDED = {
    "probe": "targets (a CSV's column target) of two kinds, or label maps of two organs",
    "retrieval": "targets (a CSV's column target) of two kinds, label maps of two organs, or reports of test patients "
    "(a CSV's column split: test), with weights of convirt or gloria",
    "zero_shot": "targets (a CSV's column target) of two kinds",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, required=True, help="what is asked")
    add_scan_arguments(parser, "labelled scans (default: the workspace's own labelled scans)")
    parser.add_argument(
        "--labels", nargs="+", metavar="N|P%", help="probe: labelled training cases used (default: 1%% 10%% 100%%)"
    )
    parser.add_argument("--prompts", metavar="FILE", help="zero_shot: YAML or JSON, each target with its texts")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="a repetition each (default: --seed)")
    parser.add_argument(
        "--control", choices=(SCRATCH, "none"), default=SCRATCH, help="ask an untrained encoder too (default), or not"
    )
    parser.add_argument(
        "--allow-overlap", action="store_true", help="report although pretraining has seen test cases, and say so"
    )
    parser.add_argument("--run", metavar="NAME", help="name of the result (default: task, weights and data)")


def run(options: argparse.Namespace) -> None:
    _check(options)
    workspace = Workspace.at(options.workspace)
    package = chosen_package(options.weights, workspace)
    card = read_card(package)
    device = launch(options.device).device
    with_texts = options.task == "zero_shot" or (options.task == "retrieval" and has_text_side(package))
    encoders = load_image_text(package).to(device) if with_texts else None
    store, data_name = labelled_store(options, workspace, card, unlabelled=options.task == "retrieval" and with_texts)
    pair = Pair(encoders, store) if encoders is not None else None
    name = options.run or f"{options.task}-{package.resolve().name}-on-{data_name}"
    folder = workspace.new_run(name, workspace.evaluations)
    check = partial(
        report_cases,
        seen=card.pretraining.cohort,
        id_key_hash=workspace.id_key_hash(),
        allow_overlap=options.allow_overlap,
    )
    asked = _asked(options, questions(store, card.data), check)
    reports = _reports(store, check) if pair is not None and options.task == "retrieval" else None
    if not asked and reports is None:
        raise UserError(f"Nothing can be asked of the {len(store)} scans: {options.task} needs {NEEDED[options.task]}.")
    with write_folder_aside(folder) as aside:
        answers = _answers(options, asked, Encoders(package, device), pair, aside)
        if pair is not None and reports is not None:
            answers += searched_by_report(pair, reports, _seeds(options)[0], aside)
        about = {
            "task": options.task,
            "package": package.resolve().name,
            "weights": sha256(package / "weights.safetensors"),
            "seeds": list(_seeds(options)),
        }
        text = write_answers(aside, about, answers)
    print(f"\n{text}\n")
    other = "retrieval" if options.task == "probe" else "probe"
    again = f"evaluate --task {other} --weights {shlex.quote(options.weights or package.name)}"
    again += f" --data {shlex.quote(options.data)}" if options.data else ""
    print(f"Results are in {folder}. Next: {workspace.command(again)}")


def _check(options: argparse.Namespace) -> None:
    if options.labels and options.task != "probe":
        raise UserError(f"--labels belongs to --task probe; {options.task} takes all labelled cases.")
    if options.prompts and options.task != "zero_shot":
        raise UserError(f"--prompts belongs to --task zero_shot, not to {options.task}.")
    if options.task == "zero_shot" and not options.prompts:
        raise UserError(
            "--task zero_shot needs --prompts FILE, each target with a list of texts; examples/prompts_sample.yaml is "
            "one for the sample cohort."
        )


def _seeds(options: argparse.Namespace) -> tuple[int, ...]:
    return tuple(dict.fromkeys(options.seeds or [options.seed]))


def _asked(options: argparse.Namespace, possible: Sequence[Question], check: Callable[..., Overlap]) -> list[Asked]:
    """What the labels allow to be asked, checked before time is spent on any of it."""
    asked = []
    for question in possible:
        if options.task == "zero_shot" and not isinstance(question, Targets):
            continue
        print(f"{question.kind[0].upper()}{question.kind[1:]}: {len(question.names)} classes.")
        overlap = check(question.all_cases, question.splits)
        asked.append(Asked(question, overlap, training_counts(options.labels or PERCENTAGES, question.splits)))
    return asked


def _reports(store: VolumeStore, check: Callable[..., Overlap]) -> Reports | None:
    """The reports that search, if there are any."""
    studies = reported(store)
    if len(studies) < 2:
        print(f"{len(studies)} test studies have a report, so nothing is searched by report.")
        return None
    print(f"Search by report: {len(studies)} test studies.")
    metas = tuple(study.metas[0] for study in studies)
    return Reports(studies, check(metas, Splits((), (), metas)))


def _answers(
    options: argparse.Namespace, asked: Sequence[Asked], encoders: Encoders, pair: Pair | None, folder: Path
) -> list[Answer]:
    arms, seeds = (PRETRAINED,) if options.control == "none" else (PRETRAINED, SCRATCH), _seeds(options)
    if options.task == "probe":
        return [probed(one, encoders, arms, seeds) for one in asked]
    if options.task == "retrieval":
        return [searched(one, encoders, arms, seeds, folder) for one in asked]
    assert pair is not None
    return [prompted(one, pair, Path(options.prompts), seeds[0], folder) for one in asked]


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["evaluate", *sys.argv[1:]])
