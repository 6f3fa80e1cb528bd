"""Commands that execute notebooks."""

from __future__ import annotations

import argparse
import os

from effad_lib.cli.options import add_data_files, add_options, allow_data_files, as_path, given, settings_options


def run_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad run`."""
    parser.add_argument("--profile", default="quick", help="a file of notebooks/profiles (default: quick)")
    parser.add_argument("--force", action="store_true", help="delete the profile's run folders and do all steps anew")
    parser.add_argument("--runs", help="folder of all runs (default: runs, in the project's folder)")
    add_data_files(parser)


def run(options: argparse.Namespace) -> int:
    """Execute the notebooks of a profile and print the table of results."""
    from effad_lib.batch import run_profile
    from effad_lib.runs import here

    allow_data_files(options)
    runs = here(options.runs) if options.runs else "runs"
    run_profile(options.profile, runs=runs, force=options.force)
    return 0


def sweep_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad sweep`."""
    from effad_lib.sweeps import SweepSettings

    parser.add_argument("file", metavar="FILE", help="a YAML file, or the name of one of notebooks/sweeps")
    add_options(parser, [option for option in settings_options(SweepSettings) if option.name != "sweep"])
    add_data_files(parser)


def sweep(options: argparse.Namespace) -> int:
    """Execute notebooks over many cases, those runs that are not done; exit code 1 if any failed."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are written, no window is opened
    from effad_lib import sweeps
    from effad_lib.runs import printable

    allow_data_files(options)
    name = as_path(options.file) if options.file.endswith((".yaml", ".yml")) else options.file
    settings = sweeps.SweepSettings.from_mapping(
        {"sweep": name} | given(options, settings_options(sweeps.SweepSettings))
    )
    plan = sweeps.load_sweep(settings.sweep, runs=settings.runs)
    table = sweeps.run_sweep(settings)
    if settings.dry_run:
        return 0
    means = sweeps.means(sweeps.finished(plan, settings.only))
    if len(means):
        print(printable(f"\n{sweeps.shown(means).to_string()}\n", keep="\n"))
    print(plan.folder / "report.html")
    chosen = [run.name for run in plan.matching(settings.only)]
    open_runs = table[table["run"].isin(chosen) & (table["state"] != "done")]
    for row in open_runs.to_dict("records"):
        print(printable(f"{row['run']} {row['state']}: {row['error'] or ''}", keep="\n"))
    return 1 if len(open_runs) else 0
