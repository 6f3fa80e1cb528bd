"""The command that measures speed."""

from __future__ import annotations

import argparse
from pathlib import Path

from effad_lib.cli.options import add_options, given, settings_options


def bench_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad bench`."""
    from effad_lib.benchmark import BenchmarkSettings

    add_options(parser, settings_options(BenchmarkSettings))
    parser.add_argument("--out", metavar="FOLDER", help="write training.csv, inference.csv, growth.csv there too")


def bench(options: argparse.Namespace) -> int:
    """Time training steps and detection beside the paper's algorithms written down literally, in one run."""
    from effad_lib import benchmark
    from effad_lib.runs import check_writable, write_text

    settings = benchmark.BenchmarkSettings.from_mapping(given(options, settings_options(benchmark.BenchmarkSettings)))
    if options.out:
        check_writable(Path(options.out).expanduser() / "training.csv")
    for name, table in benchmark.tables(settings):
        print(f"{name}; {table.attrs['where']}")
        print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"), end="\n\n")
        if options.out:
            path = Path(options.out).expanduser() / f"{name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, table.assign(where=table.attrs["where"]).to_csv(index=False, float_format="%.5g"))
    return 0
