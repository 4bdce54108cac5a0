"""The `genesis` console command: every verb as a sub-command, `genesis VERB …` = `python -m genesis.VERB …`."""

import argparse
import importlib
import io
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import NoReturn

from ._version import __version__
from .engine.ranks import first_to_fail, is_first, lost_a_process
from .errors import UserError
from .workspace import Workspace

VERBS = {
    "prepare": "read scans into the volume store and audit them",
    "discover": "find similar patients and cut pseudo-labels (prepares first if need be)",
    "train": "pretrain a network on what discover found",
    "export": "turn a run into a weights package",
    "finetune": "train on labelled scans from a weights package, against a scratch control",
    "predict": "write label maps for scans with a fine-tuned model",
    "embed": "turn scans into vectors with a pretrained encoder",
    "evaluate": "probe frozen features, search with them, or classify by prompts",
}
READING = ("predict",)  # verbs that leave the workspace as it is


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every verb has."""
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--workspace",
        metavar="DIR",
        help="where the artefacts live (default: GENESIS_WORKSPACE, else ./genesis-workspace)",
    )
    group.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="a shipped recipe such as semantic_genesis_3d, or a YAML file (default: METHOD_DIM)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        dest="overrides",
        help="change one value of the config, for instance --set train.steps=2000; may be repeated",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )
    group.add_argument("--seed", type=int, default=0, help="same config and seed, same result (default: 0)")


def add_dim_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dim", choices=("3d", "2d"), default="3d", help="volumes, or images and axial slices (default: 3d)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; user errors end with one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="genesis",
        description="Self-supervised pretraining for 3D medical images.",
        epilog="`genesis VERB --help` explains a verb; the usual order is discover, train, export, finetune, predict.",
    )
    parser.add_argument("--version", action="version", version=f"genesis {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if argv[:1] == [name]:  # the others are not imported: torch and MONAI take seconds
            module = importlib.import_module(f".{name}", __package__)
            if module.__doc__:
                verb.description = module.__doc__
                verb.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(verb)
            add_common_arguments(verb)
    options, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the verb, with its own usage
        verbs.choices[options.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    module = importlib.import_module(f".{options.verb}", __package__)
    try:
        with _sigterm_as_interrupt(), _workspace_held(options):
            module.run(options)
    except UserError as error:
        _fail(f"genesis {options.verb}: {error}", 2)
    except OSError as error:
        what = f"{error.filename or 'writing a file'}: {error.strerror or error}"
        _fail(f"genesis {options.verb}: {what}; mend that and repeat; what was written before stays valid.", 2)
    except KeyboardInterrupt as stop:
        again = shlex.join(["python", "-m", f"genesis.{options.verb}", *argv[1:]])
        said = f"genesis {options.verb}: interrupted; what was written stays valid. Go on with:\n{again}"
        _fail(said, interrupted_code(stop))
    except Exception as error:
        from .engine.memory import is_out_of_memory  # imports torch, as the verb did

        kept = "what was written before stays valid"
        if is_out_of_memory(error):
            _fail(f"genesis {options.verb}: no memory left; ask for less or free some, and repeat; {kept}.", 2)
        lost = lost_a_process(error)
        if not first_to_fail(otherwise=lost or is_first()):  # another has said why
            sys.exit(1)
        if lost:  # the one that died could not speak
            again = "see what it said, and start all of them again with the same command"
            print(f"genesis {options.verb}: another of the processes died; {again}; {kept}.", file=sys.stderr)
            sys.exit(2)
        raise


def interrupted_code(stop: KeyboardInterrupt) -> int:
    """The exit code after a signal, by default Ctrl-C: 128 and its number."""
    return 128 + int(stop.args[0] if stop.args else signal.SIGINT)


def _workspace_held(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Of the processes that torchrun or srun started, the first holds it for all."""
    if options.verb in READING or getattr(options, "dry_run", False) or not is_first():
        return nullcontext()
    return Workspace.at(options.workspace).written_by(options.verb)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that nothing temporary is left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> NoReturn:
    """Of several processes, only one says why."""
    if first_to_fail(otherwise=is_first()):
        print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
