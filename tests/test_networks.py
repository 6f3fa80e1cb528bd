"""The networks against the literal ones of the paper, and their geometry at every kind of image size."""

import literal
import pytest
import torch
from torch import nn

from effad_lib import networks
from effad_lib.networks import PDN, Autoencoder, multiply_adds

SIZES = ("S", "M", "XS")
SHAPES = [(64, 64), (96, 96), (100, 100), (128, 128), (160, 96), (480, 480), (97, 66), (131, 99)]
PADDING = pytest.mark.parametrize("padding", [False, True], ids=["unpadded", "padded"])


def images(height: int, width: int, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def pdn_cells(side: int, padding: bool) -> int:
    """Walk one side through the layer table of S, rounding down where a pool or convolution does."""
    p = 1 if padding else 0
    side = side + 6 * p - 3
    side = (side + 2 * p) // 2
    side = side + 6 * p - 3
    side = (side + 2 * p) // 2
    return side + 2 * p - 2 - 3


# --- equal to the paper's networks -----------------------------------------


@PADDING
@pytest.mark.parametrize("size, shape", [("S", (64, 100)), ("S", (71, 66)), ("M", (64, 64))], ids=str)
@torch.no_grad()
def test_pdn_is_the_papers(size, shape, padding):
    network = PDN(size, 8, padding).double()
    paper = literal.pdn(size, 8, padding).double()
    literal.copy_weights(paper, network)
    batch = images(*shape, count=2)
    expected = torch.cat([paper(image[None]) for image in batch])
    torch.testing.assert_close(network(batch), expected, rtol=1e-9, atol=1e-12)


@PADDING
@pytest.mark.parametrize(
    "size, shape", [("S", (64, 64)), ("S", (160, 99)), ("S", (256, 320)), ("M", (64, 64))], ids=str
)
@torch.no_grad()
def test_autoencoder_is_the_papers(size, shape, padding):
    network = Autoencoder(size, 8, padding).double().eval()
    paper = literal.LiteralAutoencoder(8).double().eval()
    literal.copy_weights(paper, network)
    output_size = (pdn_cells(shape[0], padding), pdn_cells(shape[1], padding))
    torch.testing.assert_close(network(images(*shape)), paper(images(*shape), output_size), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_autoencoder_drops_out_a_fifth_where_the_paper_does():
    network = Autoencoder("S", 8).double().train()
    paper = literal.LiteralAutoencoder(8).double().train().to(memory_format=torch.channels_last)  # drops in that order
    literal.copy_weights(paper, network)
    torch.manual_seed(3)
    ours = network(images(64, 64))
    torch.manual_seed(3)
    torch.testing.assert_close(ours, paper(images(64, 64), (8, 8)), rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours, network(images(64, 64)))


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_halves_are_those_of_a_full_pass(size, padding):
    network = PDN(size, 5, padding, targets=2).double()
    batch = images(64, 64, count=3)
    full = network(batch)
    first, second = network.halves(batch, 2)
    torch.testing.assert_close(first, full[:2, :5], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(second, full[2:, 5:], rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_the_student_of_xs_is_two_networks_with_one_beginning():
    student, batch = PDN("XS", 5, targets=2).double(), images(64, 64)
    for target, output in enumerate(student(batch).chunk(2, dim=1)):
        alone = PDN("XS", 5).double()
        for name, value in student.state_dict().items():
            own = name.startswith(("trunk.8.", "head."))  # the last convolution of 4×4, and of 1×1
            alone.get_parameter(name).copy_(value.chunk(2)[target] if own else value)
        torch.testing.assert_close(alone(batch), output, rtol=1e-9, atol=1e-12)


def test_sizes_of_the_paper():
    teacher, student, autoencoder = PDN("S", 384), PDN("S", 384, targets=2), Autoencoder("S", 384)
    # conv4 3→128, conv4 128→256, conv3 256→256, conv4 256→384, each with biases
    assert parameters(teacher) == 6_272 + 524_544 + 590_080 + 1_573_248 == 2_694_144  # the paper's 2.69 M
    assert parameters(student) == 4_267_392  # 4.27 M
    assert parameters(autoencoder) == 1_096_320  # 1.10 M
    together = parameters(PDN("M", 384)) + parameters(PDN("M", 384, targets=2)) + parameters(Autoencoder("M", 384))
    assert together == 8_026_624 + 11_615_488 + 1_096_320 == 20_738_432  # 20.7 M


# --- geometry --------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_geometry_of_256_pixels(size):
    batch = torch.rand(1, 3, 256, 256)
    for padding, cells in ((True, 64), (False, 56)):
        assert networks.feature_size((256, 256), padding) == (cells, cells)
        assert Autoencoder(size, 4, padding)(batch).shape == (1, 4, cells, cells)
        with torch.device("meta"):
            network = PDN(size, 384, padding)
        assert network(batch.to("meta")).shape == (1, 384, cells, cells)


@torch.no_grad()
def test_decoder_of_256_pixels_takes_the_papers_steps():
    network = Autoencoder("S", 4, padding=True).eval()
    seen = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    network(torch.rand(1, 3, 256, 256))
    sides = [256, 128, 64, 32, 16, 8, 3, 8, 15, 32, 63, 127, 64, 64]
    assert seen == [(side, side) for side in sides]
    assert network.encode(torch.rand(1, 3, 256, 256)).shape == (1, 64, 1, 1)


@PADDING
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_pdn_and_autoencoder_meet_at_every_image_size(size, shape, padding):
    with torch.device("meta"):
        pdn, autoencoder = PDN(size, 4, padding), Autoencoder(size, 4, padding)
        batch = torch.empty(2, 3, *shape)
    expected = (pdn_cells(shape[0], padding), pdn_cells(shape[1], padding))
    assert pdn(batch).shape == (2, 4, *expected)
    assert networks.feature_size(shape, padding) == expected
    assert autoencoder(batch).shape == (2, 4, *expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", [(0, 0), (3, 4), (7, 7)], ids=str)
def test_each_cell_sees_33_pixels(size, cell):
    row, column = cell
    for padding, offset in ((False, 0), (True, 4)):
        network = PDN(size, 1, padding).double()
        for parameter in network.parameters():  # every path open: the gradient is positive wherever the cell looks
            nn.init.constant_(parameter, 0.01)
        batch = torch.ones(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
        network(batch)[0, 0, row + offset, column + offset].backward()
        expected = torch.zeros(64, 64, dtype=torch.bool)
        expected[4 * row : 4 * row + 33, 4 * column : 4 * column + 33] = True
        assert torch.equal(batch.grad[0].sum(0) > 0, expected)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_padded_and_unpadded_agree_inside(size):
    padded, unpadded = PDN(size, 4, padding=True).double(), PDN(size, 4, padding=False).double()
    literal.copy_weights(padded, unpadded)
    batch = images(64, 92)
    torch.testing.assert_close(padded(batch)[..., 4:-4, 4:-4], unpadded(batch), rtol=1e-9, atol=1e-12)


# --- cost and errors -------------------------------------------------------


def test_multiply_adds():
    with torch.device("meta"):
        paper, small = ([PDN(size), PDN(size, targets=2), Autoencoder(size)] for size in ("S", "XS"))
    teacher, student, _ = map(multiply_adds, paper)
    assert round(teacher / 1e9, 1) == 15.3
    assert round(student / 1e9, 1) == 20.2
    assert 4 * sum(map(multiply_adds, small)) <= sum(map(multiply_adds, paper))


@pytest.mark.parametrize("make", [PDN, Autoencoder])
def test_unknown_size_names_the_nearest(make):
    with pytest.raises(ValueError, match=r"(?s)'XXS'.*M, S, XS.*Did you mean 'XS'"):
        make("XXS")


@pytest.mark.parametrize("shape", [(63, 64), (64, 48), (16, 256)], ids=str)
def test_images_below_64_pixels_are_refused_by_name(shape):
    message = rf"\({shape[0]}, {shape[1]}\).*at least 64"
    with pytest.raises(ValueError, match=message):
        networks.feature_size(shape, padding=False)
    with pytest.raises(ValueError, match=message):
        Autoencoder("S", 4)(torch.zeros(1, 3, *shape))


def test_a_seed_gives_the_same_weights_whatever_their_order_in_memory():
    batch = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    drawn = []
    for order in (torch.contiguous_format, torch.channels_last):
        network = PDN("XS", 8).to(memory_format=order)
        torch.manual_seed(3)
        networks.initialise(network, batch)
        drawn.append([weight.detach() for weight in network.parameters()])
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [PDN, Autoencoder], ids=lambda build: build.__name__)
@pytest.mark.parametrize("size", ["S", "M", "XS"])
def test_scaled_layers_have_unit_variance_but_for_the_last(build, size):
    network, batch = build(size, 8).eval(), torch.rand(4, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    deviations = []
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    for last in (1.0, 0.5, 0.0):
        networks.initialise(network, batch, last)
        hooks = [layer.register_forward_hook(lambda *seen: deviations.append(seen[2].std())) for layer in convolutions]
        with torch.no_grad():
            network(batch)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(torch.stack(deviations), torch.tensor([1.0] * (len(hooks) - 1) + [last]))
        deviations.clear()


@pytest.mark.parametrize("build", [PDN, Autoencoder], ids=lambda build: build.__name__)
@pytest.mark.parametrize("size", ["S", "M", "XS"])
def test_centred_layers_have_channels_of_mean_zero_whatever_the_product(build, size):
    """On images of one product, which differ by a little noise, half of the channels would always be cut off."""
    network, generator = build(size, 8).eval(), torch.Generator().manual_seed(0)
    batch = torch.rand(1, 3, 1, 1, generator=generator) + 0.05 * torch.rand(4, 3, 96, 64, generator=generator)
    seen: list[torch.Tensor] = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *passed: seen.append(passed[2].clone()))  # before the ReLU, in place
    for last in (1.0, 0.0):
        networks.initialise(network, batch, last, centred=True)
        seen.clear()
        with torch.no_grad():
            network(batch)
        for outputs, wanted in zip(seen, [1.0] * (len(seen) - 1) + [last], strict=True):
            means = outputs.mean(dim=(0, 2, 3))
            torch.testing.assert_close(means, torch.zeros_like(means), rtol=0, atol=1e-4)
            assert outputs.std() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("batch", [torch.zeros(4, 3, 64, 64), torch.full((4, 3, 64, 64), 0.3)], ids=["black", "grey"])
@pytest.mark.parametrize("build", [PDN, Autoencoder], ids=lambda build: build.__name__)
def test_centred_layers_of_images_without_anything_on_them_stay_small(build, batch):
    network = build("XS", 8).eval()
    networks.initialise(network, batch, centred=True)
    assert all(value.isfinite().all() and value.abs().max() < 1e4 for value in network.state_dict().values())
    with torch.no_grad():
        assert network(torch.rand(4, 3, 64, 64)).isfinite().all()
