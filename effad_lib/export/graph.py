"""A detector as one ONNX graph: a plain image in, maps and score out, whatever has to be resized resized inside."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effad_lib.detector import EfficientAD
from effad_lib.engines import OUTPUTS
from effad_lib.images import SMALLEST, Size

if TYPE_CHECKING:
    import onnx


class Deployed(nn.Module):
    """A detector that resizes: images [N, 3, H, W] in [0, 1] → three maps [N, 1, H, W] and the scores [N].

    The images are brought to the detector's `image_size` and the maps back to theirs; the score is the largest value
    before that, as in `effad detect`. `input_size` is the images' size, None for any.
    """

    def __init__(self, detector: EfficientAD, input_size: Size | None) -> None:
        super().__init__()
        self.detector, self.fits = detector, input_size is not None and tuple(input_size) == detector.image_size

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.fits:
            maps = self.detector(images)
            return *maps, maps.score
        maps = self.detector(resize(images, self.detector.image_size))
        stretched = F.interpolate(torch.cat(tuple(maps), dim=1), images.shape[-2:], mode="bilinear")
        return *stretched.split(1, dim=1), maps.score


def resize(images: Tensor, size: Size) -> Tensor:
    """Resize images [N, 3, H, W] in [0, 1] as Pillow does: antialiased bilinear, width first, each rounded to 8 bits.

    Written as two matrix products, which every runtime has, of sizes that need not be known beforehand. Where an image
    shrinks, two colour values in a thousand are one step of 8 bits off Pillow's; where one side grows and the other
    shrinks, recent versions of Pillow start with the height, and a quarter are.
    """
    height, width = images.shape[-2:]
    images = _round(images @ _weights(width, size[1]).T)
    return _round(_weights(height, size[0]) @ images)


def _weights(have: int, wanted: int) -> Tensor:
    """Return how much of each of `have` pixels goes into each of `wanted` ones: triangles, each of a sum of 1."""
    # As tensors: of a comparison of numbers an exporter would keep the outcome for its example.
    places = torch.arange(have) + 0.5
    scale = (places[-1:] + 0.5) / wanted
    centres = (torch.arange(wanted) + 0.5) * scale
    weights = (1 - (places - centres[:, None]).abs() / scale.clamp(min=1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def _round(images: Tensor) -> Tensor:
    return (images * 255 + 0.5).floor() / 255


class InHalf(nn.Module):
    """A network that computes in float16 between a float32 input and a float32 output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.half()).float()


def in_half(detector: EfficientAD) -> EfficientAD:
    """Return a copy whose three networks compute in float16.

    Normalisation, the teacher's mean and deviation, squared differences, quantiles and resizing stay float32: there
    small differences of large numbers count.
    """
    detector = copy.deepcopy(detector)
    for name in ("teacher", "student", "autoencoder"):
        setattr(detector, name, InHalf(getattr(detector, name)))
    return detector


def to_onnx(
    detector: EfficientAD, *, half: bool = False, batch: int = 0, input_size: Size | None, opset: int = 18
) -> onnx.ModelProto:
    """Return a detector as an ONNX graph with the input `images` and the outputs `OUTPUTS`.

    `batch` is how many images it takes, 0 any number; `input_size` their height and width, None any of at least 64.
    """
    detector = copy.deepcopy(detector).cpu().eval()
    model = Deployed(in_half(detector) if half else detector, input_size).eval()
    dynamic = {}
    if not batch:
        dynamic[0] = torch.export.Dim("batch")
    if input_size is None:
        dynamic |= {2: torch.export.Dim("height", min=SMALLEST), 3: torch.export.Dim("width", min=SMALLEST)}
    # An example of two images: of one, torch would conclude that there is always one. Likewise for the size.
    side = [length + 36 for length in detector.image_size] if input_size is None else input_size
    example = torch.zeros((batch or 2, 3, *side))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter to its own authors
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(dynamic,) if dynamic else None,
            input_names=["images"],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    return _bare(program.model_proto)


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph without the traces of its making, which name files of this machine."""
    parts = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info]
    for part in (*parts, *model.graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    return model
