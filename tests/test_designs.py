"""Designs of PDNs: their geometry, their cost, and a comparison whose table no interruption changes."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from trust import refused

from effad_lib import designs
from effad_lib.backbones import load_backbone
from effad_lib.cli import main
from effad_lib.datasets import load_dataset
from effad_lib.designs import DESIGNS, EXPLORATION, base_size, cost, describe, explore
from effad_lib.distillation import DistillationSettings
from effad_lib.distillation.targets import RecordedViews, Views
from effad_lib.images import ImageError, NaturalImages
from effad_lib.networks import PDN
from effad_lib.runs import Run, RunError
from effad_lib.settings import SettingsError


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Photographs, backbone weights and a data set with its masks, for a comparison of seconds."""
    folder, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(0)

    def write(name, size, defect=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(90, 160, (12, 12, 3), dtype=np.uint8)
        pixels = np.array(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
        if defect:
            pixels[20:40, 20:40] = 255
        Image.fromarray(pixels).save(path)

    for index in range(6):
        write(f"photographs/{index}.png", 140)
    for index in range(14):
        write(f"product/train/good/{index:03}.png", 64)
    for index in range(3):
        write(f"product/test/good/{index}.png", 64)
        write(f"product/test/hole/{index}.png", 64, defect=True)
        mask = np.zeros((64, 64), np.uint8)
        mask[20:40, 20:40] = 255
        (folder / "product" / "ground_truth" / "hole").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / "product" / "ground_truth" / "hole" / f"{index}_mask.png")
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18(weights=None).state_dict(), folder / "resnet18.safetensors")
    return folder


@pytest.fixture
def settings(given, tmp_path):
    def settings(name: str = "designs", **changes) -> DistillationSettings:
        few = {
            "steps": 3,
            "batch_size": 2,
            "statistics_images": 4,
            "fit_views": 4,
            "held_out": 2,
            "image_size": [64, 64],
        }
        own = {"run_folder": str(tmp_path / name), "images": str(given / "photographs"), "device": "cpu"}
        own["backbone_weights"] = str(given / "resnet18.safetensors")
        return DistillationSettings.from_mapping(EXPLORATION | few | own | changes)

    return settings


@pytest.fixture
def product(given):
    return load_dataset("folder", root=given / "product")


SMALL = {"views": 6, "image_size": (64, 64), "bank": 50}
TWO = ["strided-narrow", "strided-patches"]


# --- the table of designs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DESIGNS)
def test_each_design_sees_33_pixels_every_4(name):
    for padding, offset in ((False, 0), (True, 4)):
        network = PDN(base_size(name), 1, padding, DESIGNS[name]).double()
        for parameter in network.parameters():  # every path open: the gradient is positive wherever the cell looks
            nn.init.constant_(parameter, 0.01)
        batch = torch.ones(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
        network(batch)[0, 0, 3 + offset, 5 + offset].backward()
        expected = torch.zeros(64, 64, dtype=torch.bool)
        expected[12:45, 20:53] = True
        assert torch.equal(batch.grad[0].sum(0) > 0, expected)
        with torch.device("meta"):
            cells = PDN(base_size(name), 4, padding, DESIGNS[name])(torch.empty(1, 3, 256, 256)).shape
        assert cells == (1, 4, *((64, 64) if padding else (56, 56)))


def test_cost_is_counted_by_hand_for_a_depthwise_design():
    cells = 56 * 56
    first, second = 126**2 * 3 * 25 * 64, 61**2 * 25 * 64  # the latter channel by channel
    across = 61**2 * 64 * 256 + 59**2 * (9 * 256 + 256 * 256) + cells * (16 * 256 + 256 * 384)
    found = cost("strided-depthwise")
    assert found["teacher_gmac"] == pytest.approx((first + second + across) / 1e9, rel=1e-12)
    student = first + second + across + cells * 256 * 384
    twice = cells * (16 * 96 * 96 + 96 * 384) / 1e9  # the student of XS has its last two layers once for each target
    autoencoder = cost("XS")["detector_gmac"] - 2 * cost("XS")["teacher_gmac"] - twice
    assert found["detector_gmac"] == pytest.approx((first + second + across + student) / 1e9 + autoencoder, rel=1e-12)


def test_layers_in_words():
    assert describe(DESIGNS["S"]) == "4×4 128, pool, 4×4 256, pool, 3×3 256, 4×4 out"
    assert describe(DESIGNS["strided-depthwise"]).startswith("5×5/2 64, 5×5/2 each channel, 1×1 256")


# --- the comparison -------------------------------------------------------------------------------------------------


def test_recorded_views_are_those_that_the_backbone_saw(settings, given):
    made = settings()
    plain = Views(made, NaturalImages(made.images), load_backbone("resnet18", made.backbone_weights))
    recorded = RecordedViews(plain, 5, torch.device("cpu"))
    generator = torch.Generator().manual_seed(made.seed)
    drawn = [plain.draw(count, generator, torch.device("cpu")) for count in (2, 2, 1)]
    images, features = recorded.pair(torch.arange(5))
    torch.testing.assert_close(images, torch.cat([image for image, _ in drawn]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features, torch.cat([feature for _, feature in drawn]), rtol=1e-3, atol=1e-3)
    seen = recorded.large(recorded.drawn(200, torch.Generator().manual_seed(1)))
    assert set(seen.tolist()) == set(range(5))


def test_an_interrupted_comparison_ends_in_the_same_table(settings, product, tmp_path, monkeypatch):
    whole = explore(TWO[::-1], settings("whole"), [product], tmp_path / "whole.csv", **SMALL)
    assert list(whole["design"]) == TWO, "the cheapest first"
    assert whole["detector_gmac"].tolist() == [cost(name)["detector_gmac"] for name in TWO]
    assert whole["image AU-ROC folder/product"].between(0, 1).all() and whole["AU-PRO folder/product"].notna().all()
    written = pd.read_csv(tmp_path / "whole.csv")
    pd.testing.assert_frame_equal(written, whole.round(4))

    steps, take = [], designs.Distiller.train_step

    def stop_at_the_fifth(self, large):
        steps.append(self.run.folder.name)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return take(self, large)

    monkeypatch.setattr(designs.Distiller, "train_step", stop_at_the_fifth)
    stopped, out = settings("stopped", checkpoint_seconds=0.0), tmp_path / "stopped.csv"
    with pytest.raises(KeyboardInterrupt):
        explore(TWO, stopped, [product], out, **SMALL)
    assert list(pd.read_csv(out)["design"]) == TWO[:1], "what is finished is in the table"
    explore(TWO, stopped, [product], out, **SMALL)
    assert steps == [TWO[0]] * 3 + [TWO[1]] * 2 + [TWO[1]] * 2, "only what was missing is done"
    assert out.read_text() == (tmp_path / "whole.csv").read_text()

    monkeypatch.setattr(designs, "probe", None)  # what is known is not asked again
    explore(TWO, stopped, [product], out, **SMALL)
    with pytest.raises(TypeError):
        explore(TWO, stopped, [product], out, **SMALL | {"bank": 40})
    monkeypatch.setitem(designs.DESIGNS, TWO[0], DESIGNS["XS"])
    with pytest.raises(RunError, match=r"strided-narrow holds a run with other settings \(layers: "):
        explore(TWO, stopped, [product], out, **SMALL)


ALTERED = {  # a file of a distilled design, its content, and what is said
    "loss as text": ("metrics.json", '{"held_out_loss": "x", "explained_variance": 0.5}', "held_out_loss = 'x'"),
    "no loss": (
        "metrics.json",
        '{"explained_variance": 0.5}',
        r"metrics\.json has no held_out_loss. Restore or delete",
    ),
    "shares as list": ("metrics.json", '{"held_out_loss": 1.0, "explained_variance": [0.5]}', "takes a number"),
    "probes as list": ("probe.json", "[]", r"probe\.json holds list where names with values should be"),
    "a probe as number": ("probe.json", '{"folder/product": 3}', "folder/product = 3, which takes found values of"),
    "nothing found": ("probe.json", '{"folder/product": {"how": {}, "found": {}}}', "which takes found values of"),
    "found text": (
        "probe.json",
        '{"folder/product": {"how": {}, "found": {"image_auroc": "x", "au_pro": null}}}',
        "which takes found values of image_auroc, au_pro",
    ),
    "words": ("checkpoints/last.pt", "x", "cannot be read as a checkpoint"),
}


def test_distilled_designs_that_were_altered_are_refused(settings, product, tmp_path):
    made, out = settings("altered", steps=1), tmp_path / "altered.csv"
    explore(TWO[:1], made, [product], out, **SMALL)
    folder = tmp_path / "altered" / TWO[0]
    for name, content, says in ALTERED.values():
        whole = (folder / name).read_bytes()
        (folder / name).write_text(content)
        refused(lambda: explore(TWO[:1], made, [product], out, **SMALL), says)
        (folder / name).write_bytes(whole)
    run = Run(folder)
    state = run.load_checkpoint()
    for change in ({"pdn": 3}, {"pdn": {}}, {"pdn": {name: value * math.nan for name, value in state["pdn"].items()}}):
        run.save_checkpoint("last", state | change)
        refused(lambda: explore(TWO[:1], made, [product], out, **SMALL), "its checkpoint (is not of this|holds NaN)")
    (folder / "checkpoints" / "last.pt").unlink()
    refused(lambda: explore(TWO[:1], made, [product], out, **SMALL), "has lost its checkpoint. Delete the run")


def test_what_cannot_work_is_said_before_work(settings, product, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "designs.csv"

    def refused(error, match, names=TWO, splits=(product,), to=out, changes=None, **sizes):
        with pytest.raises(error, match=match):
            explore(names, settings(**(changes or {})), splits, to, **SMALL | sizes)

    refused(SettingsError, r"unknown design 'strided-narow'.*Did you mean 'strided-narrow'", names=["strided-narow"])
    refused(SettingsError, "XS, XS: takes one name or more, each once", names=["XS", "XS"])
    refused(SettingsError, "held_out = 0", changes={"held_out": 0})
    refused(SettingsError, "only 6 photographs are in", changes={"held_out": 6})
    refused(ImageError, "empty", changes={"images": str(tmp_path / "empty")})
    refused(SettingsError, "views = 1: takes a batch or more, 2", views=1)
    refused(SettingsError, "bank = 0", bank=0)
    refused(SettingsError, "each takes a name of its own", splits=(product, product))
    refused(SettingsError, "is a folder: name the file", to=tmp_path)
    assert not out.exists() and not (tmp_path / "designs").exists()


def test_the_command_compares_designs(settings, given, tmp_path, capsys):
    few = settings(steps=1).as_options(leave_out=("size",))
    out = tmp_path / "table.csv"
    sizes = f"--views 4 --probe-size 64 64 --bank 50 --out {out}"
    assert main(["designs", "strided-narrow", "--on", f"folder={given / 'product'}", *few.split(), *sizes.split()]) == 0
    printed = capsys.readouterr().out
    row = pd.read_csv(out).iloc[0]
    assert row["design"] == "strided-narrow" and row["steps"] == 1
    shown = printed.splitlines()[1].split()
    assert shown[0] == "strided-narrow" and float(shown[4]) == pytest.approx(row["held_out_loss"], abs=1e-3)
    assert printed.splitlines()[-1] == str(out)
    assert main(["designs", "strided-narow", "--on", "folder=nothing"]) == 2
    assert "Did you mean 'strided-narrow'" in capsys.readouterr().err, "before any data set is looked for"
