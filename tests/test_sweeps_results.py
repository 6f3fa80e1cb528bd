"""The tables of a sweep: means and deviations beside the published figures, and what many runs would cost."""

import json
import math
import time
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
import yaml

from effad_lib.datasets import load_dataset
from effad_lib.profiles import Step
from effad_lib.published import PAPER, REPRODUCED
from effad_lib.runs import write_json
from effad_lib.sweeps import Spent, cost, live, means, rates, seconds_per_step, shown
from effad_lib.sweeps.cost import at_a_time, expected_seconds
from effad_lib.sweeps.live import as_html, as_lines, duration
from effad_lib.sweeps.page import heat_table, write_page
from effad_lib.sweeps.plan import Sweep, SweepRun
from effad_lib.sweeps.results import summary_row, write_summary
from effad_lib.sweeps.state import Progress, progress_of, state_of
from effad_lib.training import TrainingSettings

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()


@pytest.fixture
def finished(tmp_path):
    """A function that leaves a run as a sweep would, and returns it."""

    (tmp_path / "03_training.ipynb").write_text('{"cells": []}')

    def make(
        category, seed, auroc, *, size="S", au_pro=0.9, device="x86_64 CPU, 1 threads", start=0.0, took=60.0, **more
    ):
        name = f"{category}-{size}-seed{seed}"
        folder = tmp_path / "mine" / name
        settings = TrainingSettings(
            run_folder=str(folder), dataset="mvtec_ad", category=category, size=size, seed=seed, steps=100
        )
        folder.mkdir(parents=True)
        (folder / "parameters.yaml").write_text(yaml.safe_dump(settings.as_dict()))
        metrics = {
            "data": f"mvtec_ad/{category}",
            "image_auroc": auroc,
            "au_pro": au_pro,
            "size": size,
            "seconds": 20.0,
        }
        write_json(folder / "metrics.json", metrics | more)
        write_json(folder / "provenance.json", [{"device": device, "commit": "c0ffee", "data": "da7a", "effad": "0.1"}])
        step = Step(tmp_path / "03_training.ipynb", folder, {}, settings)
        began, ended = (datetime.fromtimestamp(START + t, UTC).isoformat() for t in (start, start + took))
        told = {"papermill": {"duration": took, "start_time": began, "end_time": ended}}
        (folder / "03_training.ipynb").write_text(json.dumps({"cells": [], "metadata": told}))
        return SweepRun(name, (step,), {"category": category, "size": size, "seed": seed})

    return make


def test_means_over_seeds_stand_beside_the_figures_of_their_own_category_and_size(finished):
    runs = [finished("screw", seed, auroc) for seed, auroc in enumerate([0.90, 0.94, 0.98])]
    runs += [finished("nut", seed, auroc) for seed, auroc in enumerate([0.70, 0.80])]
    runs += [finished("screw", 0, 0.95, size="M")]
    table = means(runs)
    assert table.index.names == ["data", "size"]
    screw = table.loc["mvtec_ad/screw", "S"]
    assert screw["runs"] == 3 and screw["auroc"] == pytest.approx(0.94)
    assert screw["auroc_deviation"] == pytest.approx(np.std([0.90, 0.94, 0.98], ddof=1))
    assert screw["reproduced_auroc"] == pytest.approx(REPRODUCED["screw"][0] / 100)
    assert screw["reproduced_au_pro"] == pytest.approx(REPRODUCED["screw"][1] / 100)
    assert screw["paper_auroc"] == PAPER["mvtec_ad"]["S"]["image_auroc"]
    assert table.loc["mvtec_ad/screw", "M"]["reproduced_auroc"] == pytest.approx(REPRODUCED["screw"][2] / 100)
    assert math.isnan(table.loc["mvtec_ad/nut", "S"]["reproduced_auroc"])
    # The mean over categories, as in the paper: of each seed that has them all, then over the seeds.
    mean = table.loc["mean of 2 × mvtec_ad", "S"]
    by_seed = [(0.90 + 0.70) / 2, (0.94 + 0.80) / 2]
    assert mean["runs"] == 4 and mean["auroc"] == pytest.approx(np.mean(by_seed))
    assert mean["auroc_deviation"] == pytest.approx(np.std(by_seed, ddof=1))
    assert mean["paper_auroc"] == PAPER["mvtec_ad"]["S"]["image_auroc"]
    assert ("mean of 1 × mvtec_ad", "M") not in table.index
    text = shown(table)
    assert text.loc[("mvtec_ad/screw", "S"), "image AU-ROC"] == "0.940 ± 0.040"
    assert text.loc[("mvtec_ad/screw", "M"), "image AU-ROC"] == "0.950"
    assert text.loc[("mvtec_ad/nut", "S"), "public reproduction"] == "–"
    assert heat_table(table).loc["mvtec_ad/screw"].to_dict() == {"S": pytest.approx(0.94), "M": pytest.approx(0.95)}
    assert means([]).empty and shown(means([])).empty


def test_loco_is_measured_as_in_the_paper(finished):
    more = {"image_auroc_mean": 0.85, "au_spro_05_mean": 0.6}
    row = means([finished("pushpins", 0, 0.5, data="mvtec_loco/pushpins", **more)]).iloc[0]
    assert (row["auroc"], row["au_pro"]) == (0.85, 0.6)
    assert row["paper_auroc"] == PAPER["mvtec_loco"]["S"]["image_auroc_mean"]


def test_a_row_of_the_summary_and_the_page_say_what_a_run_was_and_found(finished, tmp_path):
    runs = [finished("screw", 0, 0.9), finished("nut", 0, 0.8)]
    sweep = Sweep(tmp_path / "mine.yaml", tmp_path / "mine", (), tuple(runs))
    rows = {run.name: summary_row(sweep, run, "done") for run in runs}
    (runs[1].folder / "failed.json").write_text(
        json.dumps({"notebook": "03.ipynb", "cell": 7, "error": "E", "message": "<i>no</i>\nmore", "at": ""})
    )
    rows[runs[1].name] = summary_row(sweep, runs[1], "failed")
    table = write_summary(sweep, rows.values()).set_index("run")
    read = pd.read_csv(tmp_path / "mine" / "summary.csv").set_index("run")
    assert read["image_auroc"].iloc[0] == table["image_auroc"].iloc[0] == 0.9
    assert read.loc["screw-S-seed0", ["commit", "data_sha256", "seconds", "training_seconds", "data"]].tolist() == [
        "c0ffee",
        "da7a",
        60.0,
        20.0,
        "mvtec_ad/screw",
    ]
    assert math.isnan(read["image_auroc"].iloc[1]) and read["error"].iloc[1] == "03.ipynb, cell 7: E: <i>no</i>"
    page = write_page(sweep, runs[:1], rows).read_text()
    assert 'href="screw-S-seed0/03_training.ipynb"' in page and "&lt;i&gt;no&lt;/i&gt;" in page and "<i>" not in page
    assert "2 runs: 1 done, 1 failed" in page and f"{REPRODUCED['screw'][0] / 100:.3f}" in page
    assert "steps: 100 (paper: 70000)" in page
    assert (tmp_path / "mine" / "heat.png").stat().st_size > 3000


def test_a_resumed_training_counts_with_all_of_its_steps(finished):
    assert Spent.of(finished("a", 0, 0.9, took=60.0)).seconds == 60.0
    assert Spent.of(finished("b", 0, 0.9, took=60.0, seconds=500.0)).seconds == 500.0


def test_what_a_thousand_runs_would_take_follows_from_what_these_took(finished):
    # Two at a time for a minute each, then one alone.
    runs = [finished("a", 0, 0.9, start=0), finished("a", 1, 0.9, start=0), finished("a", 2, 0.9, start=1000)]
    spent = [Spent.of(run) for run in runs]
    assert at_a_time(spent) == pytest.approx(180 / 120)
    table = cost(rates(spent))
    assert len(table) == 1 and "CPU" in table.index[0], "no time on a GPU is invented"
    assert table["hours"].iloc[0] == pytest.approx(1000 * 60 / 1.5 / 3600)
    assert "3 runs of 1.0 minutes, 1.5 at a time" in table["source"].iloc[0]
    table = cost(rates(spent, gpu_minutes=20, gpu_source="the paper"), gpus=(1, 8))
    assert table.loc["1 × GPU", "hours"] == pytest.approx(1000 * 20 / 60)
    assert table.loc["8 × GPU", "days"] == pytest.approx(1000 * 20 / 60 / 8 / 24)
    assert table.loc["8 × GPU", "source"] == "the paper"
    # Measured on a card, the figure from elsewhere is not used.
    card = [Spent.of(finished("b", 0, 0.9, device="Some card", took=120.0))]
    table = cost(rates(card, gpu_minutes=20, gpu_source="the paper"), gpus=(2,))
    assert table.index.tolist() == ["2 × Some card"] and table["hours"].iloc[0] == pytest.approx(1000 * 120 / 2 / 3600)


def test_the_time_of_a_step_is_measured(tmp_path, picture):
    for index in range(14):
        picture(tmp_path / f"{index}.png", size=(64, 64), seed=index)
    settings = TrainingSettings(size="XS", image_size=[64, 64], device="cpu", run_folder=str(tmp_path / "unused"))
    split = load_dataset("folder", root=tmp_path)
    began = time.monotonic()
    assert 0 < seconds_per_step(settings, split, steps=2) < (time.monotonic() - began) / 2
    assert not (tmp_path / "unused").exists()


def test_what_a_run_will_take_is_told_by_those_of_the_same_effort(finished):
    done = [finished("a", 0, 0.9, took=60.0), finished("b", 0, 0.9, took=90.0), finished("a", 0, 0.9, size="M")]
    assert expected_seconds(finished("c", 0, 0.9), done) == pytest.approx(75.0)
    assert math.isnan(expected_seconds(finished("c", 1, 0.9), done[2:]))


def test_progress_is_read_from_the_folder(finished):
    run = finished("a", 0, 0.9)
    assert state_of(run) == "waiting", "a folder that no sweep made is none of its runs"
    (run.folder / "history.csv").write_text("step,seconds,validation\n10,5.0,0.5\n20,7.0,0.4\n40,11.0,0.25\n")
    one = progress_of(run, "running")
    assert (one.step, one.steps, one.loss) == (40, 100, 0.25)
    assert one.left == pytest.approx(60 * (11.0 - 5.0) / 30)
    (run.folder / "history.csv").write_text("step,sec")
    assert progress_of(run, "running").step == 0


def test_the_table_shows_what_runs_and_what_failed_first():
    progress = {f"run{k}": Progress("waiting", 0, 100) for k in range(30)}
    progress["run20"] = Progress("running", 50, 100, 0.25, 200.0, "process 7 on host")
    progress["run21"] = Progress("failed", 10, 100, note="<b>")
    progress["run0"] = Progress("done", 90, 100)
    lines = as_lines("mine", progress, 7500.0, rows=5)
    assert lines[0] == "mine: 30 runs, 1 done, 1 failed, 1 running, 27 waiting; about 2 h 05 min left"
    assert lines[2].split() == "run20 running 50/100 3 min 0.250 process 7 on host".split()
    assert lines[3].startswith("run21") and lines[-1] == "… and 25 more"
    page = as_html("mine", progress)
    assert "<td>&lt;b&gt;</td>" in page and page.count("<tr>") == 31 and "<td>100/100</td>" in page
    assert [duration(seconds) for seconds in (math.nan, 59.6, 120, 7500)] == ["", "60 s", "2 min", "2 h 05 min"]


def test_on_a_terminal_the_table_is_drawn_in_place_and_elsewhere_a_line_for_each_change(capsys, monkeypatch):
    monkeypatch.setattr(live, "EVERY_TERMINAL", 0.0)
    waits, runs = {"a": Progress("waiting")}, {"a": Progress("running", note="process 7 on host")}
    table = live.Live("mine")
    assert table.where == "lines"
    for progress in (waits, runs, runs):
        table.draw(progress)
    assert capsys.readouterr().out == "[0/1] a running: process 7 on host\n"
    table.where = "terminal"
    table.draw(waits)
    table.draw(runs)
    first, second = capsys.readouterr().out.split("\x1b[3F\x1b[J")
    assert "waiting" in first and "running" in second
