"""Exports where they are used: the command line, a machine without torch, files that are none of ours."""

import subprocess
import sys

import numpy as np
import onnx
import pytest

from effad_lib import engines
from effad_lib.cli import main
from effad_lib.engines import load_exported
from effad_lib.runs import PROJECT, Run
from effad_lib.settings import SettingsError

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not installed here")
sys.meta_path.insert(0, Blocked())
from effad_lib.cli import main
code = main(sys.argv[1:])
print(sorted({blocked} & sys.modules.keys()))
sys.exit(code)
"""


def without(packages, *arguments):
    """Run the command line in a Python where these packages cannot be imported."""
    script = BLOCK.format(blocked=set(packages))
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


NO_TORCH = ("torch", "torchvision", "safetensors", "onnx", "onnxscript", "nncf")
NEVER = ("scipy", "seaborn", "sklearn", "skimage", "tensorboard", "papermill", "nbformat")
"""What the library needs elsewhere, and a machine that inspects does not."""


@pytest.mark.parametrize(("to", "other"), [("onnx", "openvino"), ("openvino", "onnxruntime")])
def test_a_run_is_exported_and_detects_without_torch(evaluated_run, tmp_path, capsys, to, other):
    ending = "onnx" if to == "onnx" else "xml"
    out = tmp_path / f"m.{ending}"
    assert main(["export", str(evaluated_run), "--to", to, "--compare", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "decisions that flip" in said and f"effad detect {out}" in said
    images = evaluated_run.parent / "data" / "test"
    answer = without(
        [*NO_TORCH, *NEVER, other], "detect", out, images, "--out", tmp_path / "theirs", "--save-maps", "--save-masks"
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "[]"
    main(["detect", str(Run(evaluated_run).model), str(images), "--out", str(tmp_path / "ours"), "--save-maps"])
    for path in sorted((tmp_path / "ours" / "maps").rglob("*.npy")):
        theirs = np.load(tmp_path / "theirs" / path.relative_to(tmp_path / "ours"), allow_pickle=False)
        np.testing.assert_allclose(theirs, np.load(path, allow_pickle=False), rtol=1e-3, atol=1e-4)
    ours, theirs = ((tmp_path / who / "scores.csv").read_text().splitlines() for who in ("ours", "theirs"))
    assert [line.split(",")[0] for line in ours] == [line.split(",")[0] for line in theirs] and len(ours) == 7
    assert (tmp_path / "theirs" / "heatmaps" / "dent" / "0.png.png").is_file()


def test_without_heatmaps_no_matplotlib_is_needed(any_size, picture, tmp_path):
    packages = [*NO_TORCH, *NEVER, "openvino", "matplotlib"]
    picture(tmp_path / "in" / "a.png")
    arguments = ["detect", any_size[1], tmp_path / "in", "--out", tmp_path / "out", "--threads", 1]
    answer = without(packages, *arguments)
    assert answer.returncode == 2 and "heatmaps need matplotlib (" in answer.stderr
    assert "--heatmaps none goes without." in answer.stderr and not (tmp_path / "out").exists()
    answer = without(packages, *arguments, "--heatmaps", "none")
    assert answer.returncode == 0 and answer.stdout.splitlines()[-1] == "[]", answer.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.csv"]


def test_an_export_is_known_by_its_files(any_size, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(any_size[1].read_bytes())
    same = load_exported(path, "cpu").identity
    assert same == load_exported(any_size[1], "cpu").identity and len(same) == 64
    path.write_bytes(path.read_bytes().replace(b"effad sha256 ", b"EFFAD sha256 "))  # not sealed, so not refused
    assert load_exported(path, "cpu").identity != same


def test_an_openvino_export_is_known_by_its_weights_too(tmp_path):
    (tmp_path / "m.xml").write_bytes(b"graph")
    found = set()
    for weights in (b"one", b"two", b"one"):
        (tmp_path / "m.bin").write_bytes(weights)
        found.add(engines.identity_of(tmp_path / "m.xml"))
    assert len(found) == 2


def test_what_is_missing_on_a_machine_is_named(any_size, model, picture, tmp_path):
    path = picture(tmp_path / "a.png")
    answer = without([*NO_TORCH, "onnxruntime"], "detect", any_size[1], path)
    assert answer.returncode == 2 and 'needs onnxruntime: pip install "effad[export]"' in answer.stderr
    answer = without(NO_TORCH, "detect", model, path)
    assert answer.returncode == 2 and "needs torch, which is not installed" in answer.stderr
    assert "Traceback" not in answer.stderr


# --- what an exported file refuses ----------------------------------------------------------------------------------


def test_files_that_are_no_exports_are_named(tmp_path, any_size):
    with pytest.raises(SettingsError, match="no such file"):
        load_exported(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(SettingsError, match="not a whole effad export"):
        load_exported(tmp_path / "m.onnx")
    (tmp_path / "m.xml").write_text("<net/>")
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(SettingsError, match="not a whole effad export"):
        load_exported(tmp_path / "m.xml")
    bare = onnx.load(any_size[1])
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    with pytest.raises(SettingsError, match="not a whole effad export"):
        load_exported(tmp_path / "bare.onnx")
    with pytest.raises(SettingsError, match=r"device = 'tpu': not available to this runtime. Use 'auto' or: cpu"):
        load_exported(any_size[1], "tpu")
