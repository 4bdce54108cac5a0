"""Ask a pretrained encoder what it knows, without training it further.

    python -m genesis.evaluate --task probe     --weights NAME --data D/dataset.json --labels 1% 10% 100% --seeds 0 1 2
    python -m genesis.evaluate --task retrieval --weights NAME --data D/dataset.json

probe: a linear probe and nearest neighbours on frozen features, from so many labelled training cases; judged on test
cases by accuracy and the area under the ROC curve. retrieval: each test item searches among the others; precision@k is
the share of relevant ones among the k nearest, recall@k the share of all relevant ones that is found there.

What is asked follows from the labels: with targets (a CSV's column target), which target a scan has; with label maps,
which organ is at the centre of a patch. The control is an untrained encoder of the same network, drawn anew with every
seed. Labelled scans come as for finetune, split by patient, and test cases that pretraining has seen are refused.

Results are in evaluations/NAME of the workspace: results.md, results.json and pictures.
"""

import argparse
from pathlib import Path

from .cli import command
from .downstream import add_scan_arguments, chosen_package, labelled_store
from .engine.launch import launch
from .errors import UserError
from .evaluation.answers import Answer, write_answers
from .evaluation.arms import PRETRAINED, SCRATCH
from .evaluation.cases import report_cases, training_counts
from .evaluation.frozen import Encoders, probe, search
from .evaluation.questions import Question, questions
from .evaluation.retrieval import CUTOFFS
from .files import sha256, write_folder_aside
from .weights import read_card
from .workspace import Workspace

PICTURED = 6  # queries
PROBED = ("linear AUC", "linear accuracy", "k-NN AUC", "k-NN accuracy")
SEARCHED = ("chance", *(f"{what}@{k}" for what in ("precision", "recall") for k in CUTOFFS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("probe", "retrieval"), required=True, help="what is asked")
    add_scan_arguments(parser, "labelled scans (default: the workspace's own labelled scans)")
    parser.add_argument(
        "--labels", nargs="+", metavar="N|P%", help="probe: labelled training cases used (default: 1%% 10%% 100%%)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="a repetition each (default: --seed)")
    parser.add_argument(
        "--control", choices=(SCRATCH, "none"), default=SCRATCH, help="ask an untrained encoder too (default), or not"
    )
    parser.add_argument(
        "--allow-overlap", action="store_true", help="report although pretraining has seen test cases, and say so"
    )
    parser.add_argument("--run", metavar="NAME", help="name of the result (default: task, weights and data)")


def run(options: argparse.Namespace) -> None:
    if options.labels and options.task != "probe":
        raise UserError(f"--labels belongs to --task probe; {options.task} takes all labelled cases.")
    workspace = Workspace.at(options.workspace)
    package = chosen_package(options.weights, workspace)
    card = read_card(package)
    store, data_name = labelled_store(options, workspace, card)
    name = options.run or f"{options.task}-{package.resolve().name}-on-{data_name}"
    folder = workspace.new_run(name, workspace.evaluations)
    encoders = Encoders(package, launch(options.device).device)
    arms = (PRETRAINED,) if options.control == "none" else (PRETRAINED, SCRATCH)
    seeds = tuple(dict.fromkeys(options.seeds or [options.seed]))

    asked = []
    for question in questions(store, card.data):  # all of them before time is spent on one
        print(f"{question.kind[0].upper()}{question.kind[1:]}: {len(question.names)} classes.")
        overlap = report_cases(
            question.all_cases, question.splits, card.pretraining.cohort, workspace.id_key_hash(),
            allow_overlap=options.allow_overlap,
        )  # fmt: skip
        asked.append((question, overlap, training_counts(options.labels or ("1%", "10%", "100%"), question.splits)))
    about = {
        "task": options.task,
        "package": package.resolve().name,
        "weights": sha256(package / "weights.safetensors"),
        "seeds": list(seeds),
    }
    with write_folder_aside(folder) as aside:
        answers = []
        for question, overlap, counts in asked:
            if options.task == "probe":
                answers.append(_probed(question, overlap, encoders, arms, counts, seeds))
            else:
                answers.append(_searched(question, overlap, encoders, arms, seeds, aside))
        text = write_answers(aside, about, answers, arms)
    print(f"\n{text}\n")
    other = "retrieval" if options.task == "probe" else "probe"
    again = f"evaluate --task {other} --weights {package}" + (f" --data {options.data}" if options.data else "")
    print(f"Results are in {folder}. Next: {command(options, again)}")


def _probed(
    question: Question,
    overlap: tuple[str, ...],
    encoders: Encoders,
    arms: tuple[str, ...],
    counts: tuple[int, ...],
    seeds: tuple[int, ...],
) -> Answer:
    readings = probe(question, encoders, arms, counts, seeds)
    note = (
        "AUC: the area under the ROC curve, mean over the classes against the rest. Every seed draws other training "
        "cases, and another untrained encoder (scratch); there is one pretraining, whose luck is not shown. –: not "
        "measured, for the training cases are of one class."
    )
    return Answer(question.kind, question.names, question.splits, overlap, readings, PROBED, "labelled cases", note)


def _searched(
    question: Question,
    overlap: tuple[str, ...],
    encoders: Encoders,
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    folder: Path,
) -> Answer:
    from .viewing.retrieval import draw_neighbours  # matplotlib takes a second to import

    readings, found = search(question, encoders, arms, seeds, PICTURED)
    columns = tuple(name for name in SEARCHED if name in readings[0].values)
    file = f"figures/{type(question).__name__.lower()}.png"
    draw_neighbours(folder / file, question, found, f"Queries and their nearest, by {PRETRAINED} features")
    note = (
        "Image to image: a test item searches among those of training and validation; relevant is what has its class."
    )
    return Answer(
        question.kind, question.names, question.splits, overlap, readings, columns, "candidates", note,
        {"queries and their nearest": file},
    )  # fmt: skip


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["evaluate", *sys.argv[1:]])
