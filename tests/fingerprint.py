"""What a seed gives here: `python tests/fingerprint.py [--workers N] [--threads N]` prints a hash of each result.

Two machines, Pythons or numbers of workers with the same line give the same result, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file
from trust import files

from effad_lib.datasets import load_dataset
from effad_lib.distillation import DistillationSettings, distil
from effad_lib.evaluation import evaluate_run
from effad_lib.runs import Run
from effad_lib.synthesis import SynthesisSettings, synthesize
from effad_lib.training import TrainingSettings, train


def of_bytes(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def of_state(state: dict[str, torch.Tensor]) -> str:
    return of_bytes(*(value.contiguous().numpy().tobytes() for _, value in sorted(state.items())))


def results(folder: Path, workers: int) -> dict[str, str]:
    """Return a hash of a rendered data set, a distillation, a training and its scores, all from seed 3."""
    counts = {"train": 16, "test_good": 4, "test_per_defect": 1, "image_size": [64, 64], "workers": workers}
    product = {"product": "gasket", "data_root": str(folder / "data"), "seed": 3}
    images = synthesize(SynthesisSettings.from_mapping(product | counts))
    found = {
        "synthesis": of_bytes(
            *(part for name, content in sorted(files(images).items()) for part in (name.encode(), content))
        )
    }

    torch.manual_seed(0)
    save_file(torchvision.models.resnet18(weights=None).state_dict(), folder / "backbone.safetensors")
    small = {"image_size": [64, 64], "size": "XS", "seed": 3, "device": "cpu"}
    asked = {"backbone": "resnet18", "backbone_weights": str(folder / "backbone.safetensors"), "channels": 16}
    asked |= {"images": str(images / "train"), "statistics_images": 16, "steps": 5, "batch_size": 2}
    teacher = distil(DistillationSettings.from_mapping(small | asked | {"run_folder": str(folder / "teacher")}))
    found["distillation"] = of_state(teacher.load_checkpoint("last")["pdn"])

    asked = {"dataset": "folder", "data_root": str(images), "steps": 10, "run_folder": str(folder / "run")}
    settings = TrainingSettings.from_mapping(small | asked)
    train(settings, load_dataset("folder", root=images, seed=3))
    last = Run(folder / "run").load_checkpoint("last")
    found["training"] = of_state(last["student"] | last["autoencoder"])
    found["scores"] = of_bytes(evaluate_run(folder / "run", "cpu")[2].scores.astype(np.float64).tobytes())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = results(Path(folder), options.workers)
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    print(json.dumps({"python": platform.python_version(), **versions, **found}))


if __name__ == "__main__":
    main()
