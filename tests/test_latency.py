"""Latency: what is counted and in which order, every engine the same maps, the literal implementation beside them."""

import subprocess
import sys
from pathlib import Path

import literal
import numpy as np
import onnxruntime
import pytest
import torch

from effad_lib import latency
from effad_lib.datasets import Sample
from effad_lib.detector import EfficientAD
from effad_lib.engines import load_exported
from effad_lib.evaluation import data_to_test
from effad_lib.latency import (
    LatencySettings,
    chance_detector,
    contenders,
    copy_peak,
    flop,
    grid,
    measure,
    of_literal,
    peak,
    some_of,
)
from effad_lib.metrics import image_auroc
from effad_lib.runs import PROJECT, Run
from effad_lib.settings import SettingsError

CPU = torch.device("cpu")


def test_the_work_is_the_papers():
    """76 GFLOP for S and 235 for M, at 256×256."""
    for size, expected in (("S", 76), ("M", 235)):
        with torch.device("meta"):
            detector = EfficientAD(size)
        assert flop(detector, (256, 256)) / 1e9 == pytest.approx(expected, abs=0.5)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A small detector, two images, all engines and the folder of their files."""
    detector, folder = chance_detector("S", (64, 64), CPU, channels=8), tmp_path_factory.mktemp("exports")
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    return detector, images, contenders(detector, images, folder, threads=1, compiled=False), folder


def test_all_engines_find_the_same_and_take_turns(exports):
    detector, images, found, _ = exports
    expected = {(engine, name, "cpu") for engine in ("ONNX Runtime", "OpenVINO") for name in latency.PRECISIONS}
    assert found.keys() == expected | {("torch", "float32", "cpu")}
    given = torch.from_numpy(images).float() / 255
    (combined, *_), score = found["torch", "float32", "cpu"](given)
    for key, call in found.items():
        if key[0] != "torch":
            near = 1e-4 if key[1] == "float32" else 0.02 if key[1] == "float16" else 0.3
            np.testing.assert_allclose(call(given).combined, combined[:, 0], rtol=near, atol=near * float(score.max()))
    together = of_literal(literal, detector)(given)
    np.testing.assert_allclose([one["score"] for one in together], score, rtol=1e-4)
    assert torch.get_num_threads() == 1


def test_a_device_that_does_not_start_is_told_of(exports, monkeypatch):
    """ONNX Runtime falls back to the CPU without a word if CUDA's libraries are missing."""
    path = exports[-1] / "float32.onnx"
    assert load_exported(path).device == load_exported(path.with_suffix(".xml")).device == "cpu"
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):  # its own
        assert load_exported(path).device == "cpu"
    with pytest.warns(UserWarning), pytest.raises(SettingsError, match=r"'cuda': .* could not start it, and took CPU"):
        load_exported(path, "cuda")
    asked, start = [], onnxruntime.InferenceSession.__init__

    def session(self, *given, providers, **options):
        asked.append(providers)
        start(self, *given, providers=providers, **options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", session)
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: both)
    with pytest.warns(UserWarning):
        assert load_exported(path).device == load_exported(path, "cuda").device == "cuda"
    assert asked == 2 * [[("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]]


def test_calls_take_turns_and_slow_ones_are_left_out(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(latency.time, "sleep", lambda _: None)

    def call(name, *seconds):
        took = iter(seconds)

        def work():
            order.append(name)
            clock[0] += next(took)

        return work

    calls = {
        ("a",): call("a", 9, 0.1, 0.1, 0.1, 0.2, 0.1, 0.2, 0.6),  # the first is a compilation
        ("b",): call("b", *[0.3] * 7),
        ("c",): call("c", 0.1, 3.0),
    }
    table = measure(calls, seconds=0.95, longest=1.0)
    assert order == [*"aabbcc", *"abbaabbaab", "a"]
    assert table.loc[[("a",)], "calls"].item() == 6 and table.loc[[("a",)], "median_ms"].item() == pytest.approx(150)
    assert table.loc[[("a",)], "p99_ms"].item() == pytest.approx(600, rel=0.04)
    assert table.loc[[("b",)], "median_ms"].item() == pytest.approx(300)
    assert table.loc[[("c",)], "calls"].item() == 0 and np.isnan(table.loc[[("c",)], "median_ms"].item())


def test_the_grid_has_every_case_and_what_follows_from_it(tmp_path, monkeypatch):
    keys = [("torch", "float32", "cpu"), ("torch.compile", "float32", "cpu"), ("ONNX Runtime", "float32", "cuda")]
    monkeypatch.setattr(latency, "contenders", lambda *_, **__: {key: lambda images: images.sum() for key in keys})
    monkeypatch.setattr(latency, "peak", lambda device, _: {CPU: 2e9, "cuda": 8e9}[device])
    settings = LatencySettings(sizes=["XS"], image_size=[64, 64], batches=[1, 3], seconds=0.001, compiled=["XS"])
    detector = chance_detector("XS", (64, 64), CPU, channels=8)
    table = grid({"XS": detector}, settings, tmp_path)
    cases = set(table[["engine", "precision", "device", "batch"]].itertuples(index=False, name=None))
    assert cases == {(*key, batch) for key in keys for batch in (1, 3)} - {(*keys[1], 3)}
    assert table.attrs["peaks"] == {"cpu": 2e9, "cuda": 8e9}
    for device, best in (("cpu", 2), ("cuda", 8)):
        row = table[(table["batch"] == 3) & (table["device"] == device)].iloc[0]
        assert row["images_per_second"] == pytest.approx(3000 / row["median_ms"])
        assert row["share_of_peak"] == pytest.approx(row["gflop"] * row["images_per_second"] / best)
        assert row["gflop"] == flop(detector, (64, 64)) / 1e9


@pytest.mark.parametrize(("devices", "pauses"), [(("cuda", "cuda"), {0.0}), (("cuda", "cpu"), {latency.PAUSE})])
def test_only_threads_of_a_processor_need_a_pause(devices, pauses, tmp_path, monkeypatch):
    found = {(str(k), "float32", device): lambda images: images.sum() for k, device in enumerate(devices)}
    slept, sleep = set(), latency.time.sleep
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: (slept.add(seconds), sleep(seconds)))
    monkeypatch.setattr(latency, "contenders", lambda *_, **__: found)
    monkeypatch.setattr(latency, "peak", lambda *_: 2e9)
    settings = LatencySettings(image_size=[64, 64], batches=[1], seconds=0.001, compiled=[])
    grid({"XS": chance_detector("XS", (64, 64), CPU, channels=8)}, settings, tmp_path)
    assert slept == pauses


def test_what_a_small_batch_shows_to_take_too_long_is_not_tried_with_a_larger_one(tmp_path, monkeypatch):
    clock, seen = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(latency.time, "sleep", lambda _: None)

    def engine(name, seconds):
        def call(images):
            seen.append((name, len(images)))
            clock[0] += seconds * len(images)

        return call

    found = {(name, "float32", "cpu"): engine(name, seconds) for name, seconds in {"quick": 0.1, "slow": 0.3}.items()}
    monkeypatch.setattr(latency, "contenders", lambda *_, **__: found)
    monkeypatch.setattr(latency, "peak", lambda *_: 2e9)
    settings = LatencySettings(image_size=[64, 64], batches=[16, 4, 1], longest=1.0, compiled=[])
    table = grid({"XS": chance_detector("XS", (64, 64), CPU, channels=8)}, settings, tmp_path)
    assert set(seen) == {("quick", 1), ("quick", 4), ("slow", 1)}
    medians = table.set_index(["engine", "batch"])["median_ms"]
    assert medians["quick", 4] == pytest.approx(400) and medians["slow", 1] == pytest.approx(300)
    assert medians[[("slow", 4), ("quick", 16), ("slow", 16)]].isna().all() and len(table) == 6
    assert table["calls"].min() == 0


def test_accuracy_is_that_of_the_test_images(evaluated_run):
    samples = data_to_test(evaluated_run).test
    detector = EfficientAD.load(Run(evaluated_run).model)
    table = latency.accuracy({("torch", "float32"): detector}, samples, seconds=0.001)
    assert table["image_auroc"].item() == pytest.approx(Run(evaluated_run).metrics["image_auroc"])
    assert table["median_ms"].item() > 0 and image_auroc(np.array([0.0, 1.0]), np.array([0, 1])) == 1


@pytest.mark.parametrize("count, expected", [(2, [1, 2]), (6, [1, 5]), (10, [2, 8]), (70, [4, 22])])
def test_some_of_a_test_split_have_both_kinds(count, expected):
    samples = [Sample(Path(f"{k}.png"), None, int(k not in (11, 12, 13, 14)), "") for k in range(26)]
    chosen = some_of(samples, count)
    assert [sum(sample.label == label for sample in chosen) for label in (0, 1)] == expected
    assert len(set(chosen)) == len(chosen) and set(chosen) <= set(samples)
    assert some_of(samples[:11], 3) == [samples[0], samples[5], samples[10]] and some_of([], 3) == []


def test_a_product_of_matrices_has_a_peak():
    assert 1e8 < peak(side=256, repeats=2) < 1e15


def test_a_large_copy_has_a_peak(monkeypatch):
    monkeypatch.setattr(latency, "COPIED", 2**20)
    assert 1e8 < copy_peak(repeats=2) < 1e13


@pytest.mark.parametrize("kind", ["cuda", "mps", "meta"])
def test_the_peak_of_another_device_is_torchs_alone_and_waits_for_it(kind, monkeypatch):
    class Matrix:
        device = torch.device(kind)

    order = []
    monkeypatch.setattr(torch, "rand", lambda *_, device: [Matrix(), Matrix()] if device == kind else pytest.fail())
    monkeypatch.setattr(torch, "mm", lambda *_: order.append("product"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(device))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: order.append(Matrix.device))
    assert peak(kind, side=8, repeats=2) > 0
    assert order == ["product", *([Matrix.device] if kind != "meta" else [])] * 3


@pytest.mark.parametrize(
    "values",
    [{"sizes": ["L"]}, {"batches": [0]}, {"batches": []}, {"seconds": 0}, {"image_size": [32, 32]}, {"threads": -1}],
)
def test_impossible_settings_are_named(values):
    with pytest.raises((SettingsError, ValueError), match=next(iter(values)).rstrip("s").replace("_", ".")):
        LatencySettings.from_mapping(values)


def test_a_machine_interrupted_after_openvino_is_left_alone(tmp_path):
    """Two entrances to OpenVINO that die in the wrong order would end the process at the next signal."""
    script = f"""
import signal, numpy as np, torch
from effad_lib.latency import chance_detector, contenders
images = np.zeros((2, 3, 64, 64), np.uint8)
detector = chance_detector("XS", (64, 64), torch.device("cpu"), 8)
found = contenders(detector, images, {str(tmp_path)!r}, threads=1, compiled=False)
del found
signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
signal.raise_signal(signal.SIGINT)
"""
    answer = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script], capture_output=True, text=True, cwd=PROJECT
    )
    assert answer.returncode == 0 and answer.stdout.splitlines()[-1] == "interrupted", answer.stderr[-2000:]
