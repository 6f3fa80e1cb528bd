"""The command line: thin calls of the library, listed by `effad --help`."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable

from effad_lib import __version__
from effad_lib.cli import benchmarks, data, deployment, designs, detectors, notebooks, teachers
from effad_lib.cli.options import Parser, mute, open_closed_streams, say
from effad_lib.memory import ran_out

# A command imports what it needs when it runs, so that `effad --help` does not wait for torch.

Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]

COMMANDS: dict[str, Command] = {
    "run": (notebooks.run_options, notebooks.run),
    "sweep": (notebooks.sweep_options, notebooks.sweep),
    "synthesize": (data.synthesize_options, data.synthesize),
    "damage": (data.damage_options, data.damage),
    "distill": (teachers.distill_options, teachers.distill),
    "probe": (teachers.probe_options, teachers.probe),
    "designs": (designs.designs_options, designs.designs),
    "train": (detectors.train_options, detectors.train),
    "evaluate": (detectors.evaluate_options, detectors.evaluate),
    "gallery": (detectors.gallery_options, detectors.gallery),
    "threshold": (detectors.threshold_options, detectors.threshold),
    "export": (deployment.export_options, deployment.export),
    "detect": (detectors.detect_options, detectors.detect),
    "bench": (benchmarks.bench_options, benchmarks.bench),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line; only the chosen command's options are built, as making them may need torch."""
    parser = Parser("effad", description="EfficientAD: anomaly detection trained on good images.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"effad {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), "")
    for name, (add, work) in COMMANDS.items():
        text = inspect.getdoc(work)
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(work=work)
        if name == chosen:
            add(command)
            asked = command
    options, extra = parser.parse_known_args(arguments)
    if extra:
        from effad_lib.settings import nearest

        wrong = next((argument for argument in extra if argument.startswith("-")), extra[0])
        known = set(re.findall(r"--[a-z][a-z-]*", asked.format_help()))
        asked.error(f"unknown argument {wrong}: {nearest(wrong, known).rstrip('.')}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 after an error of the user's, or 130 after Ctrl-C."""
    open_closed_streams()
    with contextlib.suppress(AttributeError):  # a notebook's output takes any letter
        if sys.stdout.errors == "strict":  # what its encoding lacks, such as "×" or a name's other bytes, is escaped
            sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(message)
        try:
            options = parse(sys.argv[1:] if arguments is None else arguments)
            return options.work(options)
        except KeyboardInterrupt as interrupt:
            print(file=sys.stderr)
            say(str(interrupt) or "stopped: what was finished before is kept.")
            return 130
        except BrokenPipeError:
            mute()
            return 0
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            # Our own errors are written for people; those from deeper are faults and keep their traceback.
            if isinstance(error, OSError) or type(error).__module__.startswith("effad_lib"):
                say(error)
            elif ran_out(error):
                say("out of memory: ask for less at a time, smaller images, or give it more.")
            else:
                raise
            return 2
