"""The benchmark measures the same algorithm twice: losses agree, work is counted, cases that grow cost more."""

import re

import literal
import numpy as np
import pytest
import torch

from effad_lib import benchmark
from effad_lib.benchmark import BenchmarkSettings
from effad_lib.cli import main
from effad_lib.latency import LEAST_CALLS
from effad_lib.settings import SettingsError

SMALL = {"image_size": [64, 64], "seconds": 1e-6, "threads": 1, "device": "cpu"}


def test_the_literal_algorithm_is_that_of_the_tests():
    assert benchmark.literal_algorithms().__file__ == literal.__file__


def test_both_steps_take_the_same_way():
    """Three steps each from the same weights on the same images: the losses fall alike."""
    with benchmark.trainer_of("S", (64, 64), batch_size=2, device="cpu") as trainer:
        trainer.detector.autoencoder.decoder.apply(lambda layer: setattr(layer, "p", 0.0))  # no dropout
        theirs, ours = benchmark.literal_step(literal, trainer), benchmark.library_step(trainer)
        before = trainer.generator.get_state()
        losses = np.array([[theirs(), ours()] for _ in range(3)])
        assert torch.equal(trainer.generator.get_state(), before)
    # The literal loss of a batch is the mean over its images of hard losses, the library's is one over all of it.
    with benchmark.trainer_of("S", (64, 64), device="cpu") as trainer:
        trainer.detector.autoencoder.decoder.apply(lambda layer: setattr(layer, "p", 0.0))
        theirs, ours = benchmark.literal_step(literal, trainer), benchmark.library_step(trainer)
        single = np.array([[theirs(), ours()] for _ in range(3)])
    np.testing.assert_allclose(single[:, 0], single[:, 1], rtol=2e-3)
    np.testing.assert_allclose(single[0, 0], single[0, 1], rtol=1e-5)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=0.1)
    assert single[-1, 0] < single[0, 0]


def test_work_of_a_step():
    """Algorithm 1 at 256×256: 219 billion multiply-adds, counted by hand in the layers."""
    with torch.device("meta"):
        detector = benchmark.EfficientAD("S")
    assert 2 * 219e9 == pytest.approx(benchmark.step_flop(detector, (256, 256)), rel=0.02)


def test_tables_of_a_small_run(tmp_path, capsys):
    arguments = [
        "--image-size",
        "64",
        "64",
        "--seconds",
        "1e-6",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--sizes",
        "S",
        "XS",
    ]
    assert main(["bench", *arguments, "--precisions", "float32", "--no-inference", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "training; " in said and "GFLOP/s" in said and re.search(r"copy \d+ GB/s", said)
    table = benchmark.pd.read_csv(tmp_path / "out" / "training.csv").set_index(["size", "program"])
    assert list(table.index) == [("S", "literal"), ("S", "effad"), ("XS", "effad")]
    step, ours = table.loc[("S", "literal")], table.loc[("S", "effad")]
    assert step["ratio"] == 1 and ours["ratio"] == pytest.approx(step["median_ms"] / ours["median_ms"], rel=1e-3)
    assert step["first_loss"] == pytest.approx(ours["first_loss"], rel=0.02)  # dropout draws other numbers
    assert np.isnan(table.loc[("XS", "effad"), "ratio"]) and (table["calls"] >= LEAST_CALLS).all()
    assert (table["share_of_peak"] > 0).all() and not (tmp_path / "out" / "inference.csv").exists()
    assert table["where"].nunique() == 1 and f"1 threads, torch {torch.__version__}" in table["where"].iloc[0]


def test_a_time_is_that_of_one_step_however_many_are_timed_together(monkeypatch):
    """On an accelerator one waits for many steps at once, as a training does."""
    taken, step = [], benchmark.Trainer.train_step

    def counted(trainer, draw):
        taken.append(draw)
        return step(trainer, draw)

    monkeypatch.setattr(benchmark.Trainer, "train_step", counted)
    monkeypatch.setattr(benchmark, "STEPS", {"cpu": 3})
    monkeypatch.setattr(benchmark, "measure", lambda calls, seconds, pause: measured(calls))

    def measured(calls):
        losses = [call() for call in calls.values()]
        index = benchmark.pd.MultiIndex.from_tuples(list(calls))
        return benchmark.pd.DataFrame({"median_ms": 30.0, "p99_ms": 60.0, "calls": 1, "now": losses}, index)

    settings = BenchmarkSettings.from_mapping(SMALL | {"sizes": ["XS"], "precisions": ["float32"]})
    (row,) = benchmark.training_table(settings, None).to_dict("records")
    assert len(taken) == 1 + 3 and row["median_ms"] == 10 and row["p99_ms"] == 20
    assert row["now"] < row["first_loss"]


def test_detection_without_exports():
    settings = BenchmarkSettings.from_mapping(SMALL | {"sizes": ["XS", "S"], "exports": False, "seconds": 0.01})
    table = benchmark.inference_table(settings, literal)
    cases = [["XS", "torch"], ["S", "literal"], ["S", "torch"]]
    found = table[["size", "engine", "precision", "batch"]].values.tolist()
    assert found == [[*case, "float32", 1] for case in cases]
    assert (table["calls"] >= LEAST_CALLS).all() and (table["median_ms"] > 0).all()
    without, one, ours = table["ratio"]
    assert np.isnan(without) and one == 1
    assert ours == pytest.approx(table["median_ms"][1] / table["median_ms"][2])


def test_growth_has_a_row_for_each_case(monkeypatch):
    monkeypatch.setattr(benchmark, "GROWTH", {"images": (4, 8), "side": (64,), "batch": (1,)})
    table = benchmark.growth_table(BenchmarkSettings(sizes=["XS"], growth=True, threads=1, device="cpu"))
    assert table[["grows", "value"]].values.tolist() == [["images", 4], ["images", 8], ["side", 64], ["batch", 1]]
    assert (table[["start_s", "step_ms", "detect_ms"]] > 0).all(axis=None) and (table["peak_mb"] > 100).all()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sizes": ["L"]}, "unknown network size 'L'"),
        ({"sizes": []}, "sizes takes at least one name"),
        ({"precisions": []}, "precisions takes at least one name"),
        ({"seconds": 0.0}, "seconds takes a number above 0"),
        ({"threads": -1}, "threads takes"),
        ({"precisions": ["int4"]}, "precision takes one of"),
        ({"compiled": "fast"}, "compiled takes"),
        ({"optimiser": "sgd"}, "optimiser takes one of adam, muon"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(SettingsError, match=message):
        BenchmarkSettings.from_mapping({**SMALL, **wrong})
