"""The page of a run, and several runs beside each other and the published figures."""

import html
import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml

from effad_lib import reports
from effad_lib.datasets import Sample
from effad_lib.detector import AnomalyMaps
from effad_lib.evaluation import Evaluation
from effad_lib.published import PAPER, REPRODUCED, REPRODUCED_MEAN, published
from effad_lib.runs import RunError
from effad_lib.training import TrainingSettings


@pytest.fixture
def found(picture, tmp_path):
    """Six images, three of them defective without masks; a miss and a false alarm."""
    scores = np.array([0.1, 0.2, 0.9, 0.3, 0.8, 1.4])
    paths = [picture(tmp_path / f"{k}.png", seed=k) for k in range(6)]
    samples = [Sample(path, None, int(k > 2), "dent" if k > 2 else "good <&>") for k, path in enumerate(paths)]
    maps = np.broadcast_to(scores[:, None, None], (6, 64, 64)).astype(np.float32)
    labels, sizes = np.repeat([0, 1], 3), ((64, 64),) * 6
    return Evaluation(tuple(samples), scores, labels, AnomalyMaps(maps, maps, maps), sizes, 0.5)


def test_the_page_has_all_tables_and_every_figure_it_shows(found, tmp_path):
    with pytest.raises(RunError, match="holds no evaluation"):
        reports.write_report(tmp_path / "run", found, (64, 64), {"data": "mine", **found.metrics()})
    data = "mvtec_ad/<script>"
    run = write_run(tmp_path / "run", 0, found.metrics()["image_auroc"], data=data, steps=123)
    page = reports.write_report(run, found, (64, 64), {"data": data, **found.metrics()})
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "run" / "report.html" and "<script>" not in text and "&lt;script&gt;" in text
    pictures = re.findall(r'src="([^"]+)"', text)
    assert pictures == [f"figures/{name}.png" for name in ("scores", "roc", "misses", "false_alarms")]
    assert all((page.parent / name).stat().st_size > 5000 for name in pictures)
    assert f"{found.metrics()['image_auroc']:.3f}" in text and "have no mask" in text and "called defective" in text
    (compared,) = re.findall("<pre>(.*?)</pre>", text, re.DOTALL)
    assert html.unescape(compared) == reports.beside_published([run])
    assert "the paper, S, mean of all" in compared and "steps: 123 (paper: 70000)" in compared


def write_run(
    folder, seed, auroc, *, data="mvtec_ad/screw", steps=100, au_pro=0.9, image_ap=0.9, size="S", root="", dataset=""
):
    """A run folder as `effad evaluate` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    known, _, category = data.partition("/")
    made = {"dataset": dataset or known, "category": category, "data_root": root, "steps": steps, "seed": seed}
    made = TrainingSettings(run_folder=str(folder), size=size, **made)
    (folder / "parameters.yaml").write_text(yaml.safe_dump(made.as_dict()))
    result = {"data": data, "image_auroc": auroc, "image_ap": image_ap, "pixel_auroc": None, "au_pro": au_pro}
    result["size"] = size
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


def test_seeds_make_a_mean_and_a_deviation_and_other_settings_another_row(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed, auroc) for seed, auroc in enumerate([0.7, 0.8, 0.9])]
    longer = write_run(tmp_path / "longer", 0, 0.95, steps=200)
    table = reports.across([*runs, longer])
    assert table.index.tolist() == ["mvtec_ad/screw S, steps 100", "mvtec_ad/screw S, steps 200"]
    assert table["runs"].tolist() == [3, 1]
    assert table["image_auroc", "mean"].tolist() == pytest.approx([0.8, 0.95])
    assert table["image_auroc", "deviation"].iloc[0] == pytest.approx(np.std([0.7, 0.8, 0.9], ddof=1))
    assert pd.isna(table["image_auroc", "deviation"].iloc[1]) and "pixel_auroc" not in table
    with pytest.raises(RunError, match=r"holds no evaluation.*effad evaluate"):
        reports.across([tmp_path / "nothing"])


def test_data_of_the_same_name_in_other_folders_are_no_seeds(tmp_path):
    mine, other = tmp_path / "monday" / "parts", tmp_path / "friday" / "parts"
    where = {"data": "folder/parts", "dataset": "folder"}
    runs = [write_run(tmp_path / str(seed), seed, 0.9, root=str(mine), **where) for seed in range(2)]
    runs += [write_run(tmp_path / "other", 2, 0.5, root=str(other), **where)]
    table = reports.across(runs)
    assert table.index.tolist() == [f"folder/parts S, folder in {folder}" for folder in (mine, other)]
    assert table["runs"].tolist() == [2, 1] and table["image_auroc", "mean"].tolist() == [0.9, 0.5]
    assert reports.across(runs[:2]).index.tolist() == ["folder/parts S"]
    moved = [write_run(tmp_path / f"screw{seed}", seed, 0.9, root=str(tmp_path / str(seed))) for seed in range(2)]
    assert reports.across(moved)["runs"].tolist() == [2], "MVTec AD is the same wherever it lies"


def test_runs_that_no_metric_is_known_of_have_a_dash(tmp_path):
    run = write_run(tmp_path / "good_only", 0, None, au_pro=None, image_ap=None)
    table = reports.across([run])
    assert table.columns.tolist() == [("runs", ""), ("image_auroc", "mean"), ("image_auroc", "deviation")]
    assert re.search(r"^mvtec_ad/screw S +1 +–$", reports.beside_published([run]), re.MULTILINE)


def test_published_figures_and_departures_stand_beside_ours(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed, auroc) for seed, auroc in enumerate([0.7, 0.8])]
    text = reports.beside_published(runs)
    assert "0.750 ± 0.071" in text and "mvtec_ad/screw S" in text
    assert re.search(r"best-known public reproduction, S, screw +0\.979 +0\.956", text)
    assert "steps: 100 (paper: 70000)" in text and text.count("teacher: ") == 1  # once for both runs
    own = write_run(tmp_path / "own", 0, 0.5, data="folder/mine")
    assert "Published" not in reports.beside_published([own])
    tiny = write_run(tmp_path / "tiny", 0, 0.6, size="XS")
    assert reports.beside_published([*runs, tiny]).count("anomalib, S, screw") == 1  # once for S and XS


def test_the_published_means_are_those_of_the_categories():
    table = pd.DataFrame(REPRODUCED).T
    assert len(table) == 15
    assert table.mean().tolist() == pytest.approx(REPRODUCED_MEAN, abs=0.03)
    for size in ("S", "M"):
        loco = PAPER["mvtec_loco"][size]
        kinds = [loco["image_auroc_logical"], loco["image_auroc_structural"]]
        assert loco["image_auroc_mean"] == pytest.approx(np.mean(kinds), abs=1e-3)
    assert not len(published("folder/x", "S"))


@pytest.mark.parametrize(
    ("data", "size", "row", "metric", "value"),
    [
        ("mvtec_ad/screw", "M", "best-known public reproduction, M, screw", "au_pro", 0.973),
        ("mvtec_ad/screw", "S", "best-known public reproduction, S, mean of 15 categories", "au_pro", 0.9328),
        ("mvtec_ad/my_part", "M", "best-known public reproduction, M, mean of 15 categories", "image_auroc", 0.9909),
        ("mvtec_ad/screw", "M", "anomalib, M, screw", "image_auroc", 0.975),
        ("mvtec_ad/screw", "XS", "the runs of PUAD's authors, S, screw", "image_auroc", 0.961),
        ("visa/candle", "XS", "the paper, S, mean of mvtec_ad, visa and mvtec_loco", "au_pro", 0.925),
        ("mvtec_loco/pushpins", "M", "the paper, M, on an RTX A6000", "latency_ms", 4.5),
        ("mvtec_ad_2/can", "S", "the paper of MVTec AD 2, private test images, mixed lighting", "au_pro_05", 0.192),
    ],
)
def test_published_figures_say_of_what_they_are(data, size, row, metric, value):
    assert published(data, size).loc[row, metric] == pytest.approx(value)
