"""What the tests of sweeps share: a notebook that counts, saving every number, and a sweep of it."""

import time

import nbformat

from effad_lib.sweeps import load_sweep

PARAMETERS = 'run_folder = "runs/one"\ncount = 3\nseconds = 0.0\nfails = False\nseed = 0'

COUNTS = """import json, os, time
from pathlib import Path

def write(name, value):
    partial = Path(run_folder) / f".{name}"
    partial.write_text(json.dumps(value))
    partial.replace(Path(run_folder) / name)

checkpoint = Path(run_folder) / "checkpoint.json"
numbers = json.loads(checkpoint.read_text()) if checkpoint.exists() else [seed]
with open(Path(run_folder) / "starts.txt", "a") as file:
    print(len(numbers), os.environ.get("OMP_NUM_THREADS"), os.getpid(), file=file)"""

WORKS = """while len(numbers) <= count:
    time.sleep(seconds / count)
    numbers.append((numbers[-1] * 1103515245 + 12345) % 2**31)
    write("checkpoint.json", numbers)
    history = "\\n".join(f"{k},{k * 0.1},{1 / k}" for k in range(1, len(numbers)))
    (Path(run_folder) / "history.csv").write_text(f"step,seconds,validation\\n{history}\\n")"""

FAILS = 'if fails and not (Path(run_folder) / "mended").exists():\n    raise ValueError("a <b>bad</b> case")'

FINISHES = 'write("metrics.json", {"last": numbers[-1], "sum": sum(numbers)})'

CELLS = (PARAMETERS, COUNTS, WORKS, FAILS, FINISHES)
"""Of the notebook."""


def notebook(path, *cells):
    """Write a notebook whose first cell are the parameters."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, path)


def planned(arguments):
    """The plan behind the arguments of run_sweep."""
    settings = arguments["settings"]
    return load_sweep(settings.sweep, runs=settings.runs, notebooks=arguments["notebooks"])


def starts(folder):
    """How many numbers were there at each start of a run's notebook."""
    path = folder / "starts.txt"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(seed, count=3):
    """What the notebook should find."""
    found = [seed]
    while len(found) <= count:
        found.append((found[-1] * 1103515245 + 12345) % 2**31)
    return found


def wait_for(condition, seconds=90):
    """Wait until a condition holds; fails if it does not within so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)
