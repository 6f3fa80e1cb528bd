"""Commands that execute notebooks."""

from __future__ import annotations

import argparse
from pathlib import Path


def run_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad run`."""
    parser.add_argument("--profile", default="quick", help="a file of notebooks/profiles (default: quick)")
    parser.add_argument("--force", action="store_true", help="delete the profile's run folders and do all steps anew")
    parser.add_argument("--runs", help="folder of all runs (default: runs, in the project's folder)")


def run(options: argparse.Namespace) -> int:
    """Execute the notebooks of a profile and print the table of results."""
    from effad_lib.batch import run_profile

    runs = Path(options.runs).expanduser().resolve() if options.runs else "runs"
    run_profile(options.profile, runs=runs, force=options.force)
    return 0
