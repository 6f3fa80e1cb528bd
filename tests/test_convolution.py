"""Winograd's convolution against torch's own in float64, values and gradients."""

import copy

import pytest
import torch
from torch.nn import functional as F

from effad_lib import convolution
from effad_lib.convolution import Conv2d, convolve, pays
from effad_lib.networks import PDN

PLENTY = 192
"""Channels for which it pays."""


@pytest.fixture(autouse=True)
def few_tiles_suffice(monkeypatch):
    monkeypatch.setattr(convolution, "LEAST_TILES", {3: 4, 4: 4})
    monkeypatch.setattr(convolution, "LEAST_SUMS", 0)
    monkeypatch.setattr(convolution, "BAND", 60)


def case(r, height, width, *, count=1, channels=PLENTY, out_channels=PLENTY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, r, r, generator=generator) / (channels * r * r) ** 0.5
    return images, weight, torch.randn(out_channels, generator=generator)


def assert_near(got, want):
    """Within float32's rounding of sums over some thousand products, against the mean of what is compared."""
    assert got.shape == want.shape and got.dtype == torch.float32
    assert (got - want).abs().max() <= 2e-4 * want.abs().mean()


CASES = [
    # kernel, height, width, images, padding
    (3, 8, 8, 1, 0),
    (3, 9, 31, 1, 1),
    (3, 61, 61, 2, 0),
    (4, 8, 8, 1, 0),
    (4, 9, 8, 3, 3),
    (4, 40, 126, 1, 0),  # a part of the image at a time
    (4, 11, 11, 20, 0),  # several images at a time, the last band with fewer
    (4, 13, 200, 2, 2),
    (4, 8, 700, 1, 0),  # one row of tiles is more than a band
]


@pytest.mark.parametrize("r, height, width, count, padding", CASES)
def test_values_and_gradients(r, height, width, count, padding):
    given = [tensor.requires_grad_() for tensor in case(r, height, width, count=count, out_channels=200)]
    assert pays(*given[:2], padding)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    got, want = convolve(*given, padding), F.conv2d(*exact, padding=padding)
    assert_near(got, want)
    towards = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(got, given, towards.float()), torch.autograd.grad(want, exact, towards), strict=True
    ):
        assert_near(ours, theirs)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_of_some(wanted):
    given = [tensor.requires_grad_(want) for tensor, want in zip(case(4, 12, 12), wanted, strict=True)]
    convolve(*given).square().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    F.conv2d(*exact).square().sum().backward()
    for ours, theirs, want in zip(given, exact, wanted, strict=True):
        assert (ours.grad is not None) is want
        if want:
            assert_near(ours.grad, theirs.grad)


def test_any_order_in_memory_and_a_rectified_result_in_place():
    images, weight, bias = case(3, 13, 17)  # the last row of tiles is cut, the last column is not
    weight.requires_grad_()
    turned = images.mT  # and the other way round
    for given in (images, images.contiguous(memory_format=torch.channels_last), images.expand(2, -1, -1, -1), turned):
        result = torch.relu_(convolve(given, weight, bias))
        exact = weight.detach().double().requires_grad_()
        wanted = F.relu(F.conv2d(given.double(), exact, bias.double()))
        assert_near(result, wanted)
        assert_near(torch.autograd.grad(result.sum(), weight)[0], torch.autograd.grad(wanted.sum(), exact)[0])


@pytest.mark.parametrize("r", [3, 4])
def test_weights_with_their_channels_last(r):
    images, weight, bias = case(r, 19, 19)
    ours = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = weight.double().requires_grad_()
    got, wanted = convolve(images, ours, bias), F.conv2d(images.double(), exact, bias.double())
    assert_near(got, wanted)
    assert_near(*(torch.autograd.grad(one.square().sum(), of)[0] for one, of in ((got, ours), (wanted, exact))))


def test_no_image_at_all():
    images, weight, bias = case(4, 12, 12)
    empty = convolve(images[:0].requires_grad_(), weight.requires_grad_(), bias)
    assert empty.shape == (0, PLENTY, 9, 9)
    assert torch.equal(torch.autograd.grad(empty.sum(), weight)[0], torch.zeros_like(weight))


def test_gradients_are_float32_where_autocast_is_on_by_then():
    images, weight, bias = case(4, 12, 12)
    result = convolve(images, weight.requires_grad_(), bias)
    wanted = torch.autograd.grad(result.sum(), weight, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(result.sum(), weight)[0], wanted)


@pytest.mark.parametrize(
    "more",
    [
        {"bias": False},
        {"padding": "same"},
        {"padding": (1, 2)},
        {"dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"groups": 2},
    ],
    ids=str,
)
def test_what_it_does_not_do_is_left_to_torch(more):
    torch.manual_seed(0)
    ours, theirs = Conv2d(PLENTY, PLENTY, 3, **more), torch.nn.Conv2d(PLENTY, PLENTY, 3, **more)
    theirs.load_state_dict(ours.state_dict())
    images = case(3, 16, 16)[0]
    assert torch.equal(ours(images), theirs(images))
    assert torch.equal(ours(images[0]), theirs(images[0]))


@pytest.mark.filterwarnings("ignore:TF32")
def test_where_torch_may_not_use_onednn():
    given = case(3, 16, 16)
    assert pays(*given[:2])
    with torch.backends.mkldnn.flags(enabled=False):
        assert not pays(*given[:2])
        assert torch.equal(convolve(*given), F.conv2d(*given))


def test_same_bits_again():
    given = case(4, 30, 30, count=2)
    assert torch.equal(convolve(*given), convolve(*given))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(4, 13, 18), (4, 30, 41), (3, 17, 22)], ids=str)
def test_an_image_is_computed_alike_alone_and_in_a_batch(size, threads, monkeypatch):
    images, weight, bias = case(*size, count=5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([convolve(each, weight, bias) for each in images.split(1)])
        for band in (1, 60, 1000):  # a row of tiles, some images, all of them
            monkeypatch.setattr(convolution, "BAND", band)
            assert torch.equal(convolve(images, weight, bias), alone)
    finally:
        torch.set_num_threads(before)


def test_where_it_does_not_pay_the_result_is_torchs_own():
    thin, small, large = case(3, 16, 16, channels=8), case(3, 5, 5), case(5, 16, 16)
    exact = [tensor.double() for tensor in case(3, 16, 16)]
    for given in (thin, small, large, exact):
        assert not pays(*given[:2])
        assert torch.equal(convolve(*given), F.conv2d(*given))
    images, weight, bias = case(3, 16, 16)
    strided = Conv2d(PLENTY, PLENTY, 3, stride=2)
    assert torch.equal(strided(images), F.conv2d(images, strided.weight, strided.bias, stride=2))
    assert convolve(images.to("meta"), weight.to("meta"), bias.to("meta")).shape == (1, PLENTY, 14, 14)


def test_autocast_keeps_its_precision():
    layer, images = Conv2d(PLENTY, PLENTY, 3), case(3, 16, 16)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(images, layer.weight)
        assert layer(images).dtype == torch.bfloat16


def test_exporters_see_a_convolution():
    program = torch.export.export(Conv2d(PLENTY, PLENTY, 3), (case(3, 16, 16)[0],))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert calls == {"aten.conv2d.default"}


def test_the_networks_use_it(monkeypatch):
    seen = []
    original = convolution._Winograd.apply
    monkeypatch.setattr(convolution._Winograd, "apply", lambda *given: seen.append(given[1].shape) or original(*given))
    PDN("S")(torch.rand(1, 3, 64, 64))
    assert seen == [(256, 128, 4, 4), (256, 256, 3, 3), (384, 256, 4, 4)]
    seen.clear()
    PDN("XS")(torch.rand(1, 3, 64, 64))
    assert seen == [(96, 48, 4, 4), (96, 96, 3, 3), (96, 96, 4, 4)]


def test_few_channels_need_more_tiles(monkeypatch):
    monkeypatch.undo()  # the constants as they are
    for channels, small, large in ((48, 62, 126), (256, 20, 27)):  # inputs of a second convolution, and of a last one
        weight = torch.zeros(2 * channels, channels, 4, 4)
        assert not pays(torch.zeros(1, channels, small, small), weight)
        assert pays(torch.zeros(1, channels, large, large), weight)


# --- kernels of frozen weights --------------------------------------------------------------------------------------


@pytest.fixture
def transforms_counted(monkeypatch):
    seen, original = [], convolution.transformed
    monkeypatch.setattr(convolution, "transformed", lambda weight: seen.append(1) or original(weight))
    return seen


def frozen(r=3):
    return Conv2d(PLENTY, PLENTY, r).requires_grad_(False)


def assert_as_torch(layer, images):
    assert_near(layer(images), F.conv2d(images, layer.weight, layer.bias))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_frozen_kernels_are_transformed_once(transforms_counted, mode):
    layer, images = frozen(), case(3, 16, 16)[0]
    with mode():
        for _ in range(3):
            assert_as_torch(layer, images)
    assert len(transforms_counted) == 1
    images.requires_grad_()
    layer(images).square().sum().backward()
    exact = images.detach().double().requires_grad_()
    F.conv2d(exact, layer.weight.double(), layer.bias.double()).square().sum().backward()
    assert_near(images.grad, exact.grad)
    assert len(transforms_counted) == 1


def test_kernels_that_are_learned_are_transformed_once_a_step(transforms_counted):
    layer, images = Conv2d(PLENTY, PLENTY, 3), case(3, 16, 16)[0]
    for _ in range(2):
        layer(images).sum().backward()
    assert len(transforms_counted) == 2 and layer._kept is None


def scale_in_place(layer):
    layer.weight.mul_(2)


def load(layer):
    layer.load_state_dict({name: value * 3 for name, value in layer.state_dict().items()})


def assign(layer):
    layer.load_state_dict({name: value * 3 for name, value in layer.state_dict().items()}, assign=True)
    layer.requires_grad_(False)


def round_off(layer):
    layer.half().float()


def new_storage(layer):
    layer.weight.data = layer.weight.data * 5


def a_single_weight(layer):
    layer.weight.data[5, 4, 1, 1] += 1  # unseen by autograd


def learn_more(layer):
    optimiser = torch.optim.Adam(layer.requires_grad_().parameters(), lr=0.1, fused=True)
    images = case(3, 16, 16)[0]
    convolve(images, layer.weight[:], layer.bias).sum().backward()  # as halves of the student's last layer are
    optimiser.step()
    layer.requires_grad_(False)


@pytest.mark.parametrize("change", [scale_in_place, load, assign, round_off, new_storage, a_single_weight, learn_more])
def test_changed_weights_are_transformed_anew(change):
    layer, images = frozen(), case(3, 16, 16)[0]
    before = layer(images)
    change(layer)
    assert_as_torch(layer, images)
    assert not torch.equal(layer(images), before)


def test_a_copy_has_its_own():
    layer, images = frozen(), case(3, 16, 16)[0]
    with torch.inference_mode():
        layer(images)
    other = copy.deepcopy(layer)
    assert list(other.state_dict()) == ["weight", "bias"] and other._kept is None
    other.weight.mul_(2)
    for each in (layer, other):
        assert_as_torch(each, images)


def test_weights_that_are_made_in_inference_mode():
    with torch.inference_mode():
        layer, images = frozen(), case(3, 16, 16)[0]
        for _ in range(2):
            assert_as_torch(layer, images)
            layer.weight.mul_(2)
