"""Algorithms 1-3 of the library, which share passes and halve layers, against the literal ones, which do not."""

import copy
from types import SimpleNamespace

import literal
import numpy as np
import pytest
import torch
from PIL import Image

from effad_lib import distillation, training
from effad_lib.calibration import calibrate
from effad_lib.detector import EfficientAD
from effad_lib.distillation import DistillationSettings, channel_statistics, distil
from effad_lib.images import NaturalImages
from effad_lib.networks import PDN
from effad_lib.runs import Run

CHANNELS = 6
CASES = [
    ("S", False, (64, 64)),
    ("S", False, (64, 128)),
    ("S", True, (70, 67)),
    ("M", False, (64, 64)),
    ("M", True, (64, 64)),
]
EACH_CASE = pytest.mark.parametrize("size, padding, shape", CASES, ids=str)


def assert_same(got, want, name="value"):
    """Equal but for the order of additions, against the largest element."""
    allowed = 1e-9 if want.dtype == torch.float64 else 1e-4
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= allowed * want.abs().max(), name


def pictures(count, shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.rand(count, 1, 3, *shape, generator=generator, dtype=dtype))


def both(size, padding, shape, dtype=torch.float64):
    """Return a detector and the paper's networks with the same weights, and teacher statistics of two images."""
    torch.manual_seed(0)
    detector = EfficientAD(size, CHANNELS, padding, shape).to(dtype).eval()
    paper = SimpleNamespace(
        T=literal.pdn(size, CHANNELS, padding).to(dtype),
        S=literal.pdn(size, 2 * CHANNELS, padding).to(dtype),
        A=literal.LiteralAutoencoder(CHANNELS).to(dtype).eval(),
    )
    literal.copy_weights(detector.teacher, paper.T)
    literal.copy_weights(detector.student, paper.S)
    literal.copy_weights(detector.autoencoder, paper.A)
    paper.mu, paper.sigma = literal.teacher_statistics(paper.T, pictures(2, shape, seed=1, dtype=dtype))
    detector.teacher_mean.copy_(paper.mu.view(1, -1, 1, 1))
    detector.teacher_std.copy_(paper.sigma.view(1, -1, 1, 1))
    return detector, paper


def networks(paper):
    return paper.T, paper.S, paper.A, paper.mu, paper.sigma


# --- Algorithm 1 ---------------------------------------------------------------------------------


@EACH_CASE
def test_losses_and_gradients_of_a_step(size, padding, shape):
    detector, paper = both(size, padding, shape)
    I, P = pictures(2, shape, seed=2, dtype=torch.float64)  # noqa: E741
    I_aug = literal.augment(I, "contrast", 0.83)
    expected = literal.training_losses(*networks(paper), I, I_aug, P, p_hard=0.97)
    expected["total"].backward()
    terms = training.training_losses(detector, I, I_aug, P, hard_quantile=0.97)
    sum(terms).backward()
    for name, term in terms._asdict().items():
        assert_same(term, expected[name], name)
    for ours, theirs in ((detector.student, paper.S), (detector.autoencoder, paper.A)):
        for (name, parameter), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert_same(parameter.grad, reference.grad, name)
    assert all(parameter.grad is None for parameter in detector.teacher.parameters())


def test_known_teacher_features_and_the_default_quantile():
    detector, paper = both("S", False, (64, 64))
    I, I_aug, P = pictures(3, (64, 64), seed=2)  # noqa: E741
    known = literal.T_hat(paper.T, I, paper.mu, paper.sigma)
    terms = training.training_losses(detector, I, I_aug, P, teacher_features=known)
    expected = literal.training_losses(*networks(paper), I, I_aug, P)
    for name, term in terms._asdict().items():
        assert_same(term, expected[name], name)


def test_batch_is_the_mean_over_images_and_one_quantile():
    detector, paper = both("S", False, (64, 64))
    I, I_aug, P = (torch.cat(pictures(2, (64, 64), seed=seed)) for seed in (2, 3, 4))  # noqa: E741
    terms = training.training_losses(detector, I, I_aug, P)
    single = [literal.training_losses(*networks(paper), I[[i]], I_aug[[i]], P[[i]]) for i in range(2)]
    for name in ("penalty", "autoencoder", "student_autoencoder"):
        assert_same(getattr(terms, name), (single[0][name] + single[1][name]) / 2, name)
    targets = [literal.T_hat(paper.T, I[[i]], paper.mu, paper.sigma) for i in range(2)]
    outputs = [paper.S(literal.normalise(I[[i]]))[:, :CHANNELS] for i in range(2)]
    assert_same(terms.hard, literal.hard_loss(torch.cat(targets), torch.cat(outputs)))


def test_statistics_are_two_pass():
    generator = torch.Generator().manual_seed(0)
    features = [1e4 + torch.randn(1, 5, 4, 6, generator=generator) for _ in range(7)]
    for feature in features:
        feature[:, 3], feature[:, 4] = 2.5, 0.0
    mean, deviation = channel_statistics(torch.cat(part) for part in (features[:3], features[3:6], features[6:]))
    mu, sigma = literal.feature_statistics(features)
    assert sigma[3] == sigma[4] == 0
    sigma[3:] = 1  # a channel that never varies must not divide by zero
    torch.testing.assert_close(mean.flatten().double(), mu, rtol=1e-6, atol=0)
    torch.testing.assert_close(deviation.flatten().double(), sigma, rtol=1e-6, atol=0)


@pytest.fixture
def photographs(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(3):
        pixels = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((160, 130)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_two_training_steps(tmp_path, photographs, optimiser):
    """From uint8 images to updated weights: statistics, cached teacher, dropout, Adam, or Muon where it is asked."""
    shape, steps = (64, 64), 2
    settings = training.TrainingSettings(
        run_folder=str(tmp_path / "run"),
        image_size=shape,
        steps=steps,
        optimiser=optimiser,
        learning_rate=1e-3,
        device="cpu",
    )
    detector, paper = both("S", False, shape)
    images = torch.randint(0, 256, (4, 3, *shape), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    trainer = training.Trainer(
        settings, Run(settings.run_folder), detector, images, images[:2], NaturalImages(photographs)
    )
    singles = [image[None].double() / 255 for image in images]
    paper.mu, paper.sigma = literal.teacher_statistics(paper.T, singles)
    torch.testing.assert_close(detector.teacher_mean.flatten(), paper.mu, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(detector.teacher_std.flatten(), paper.sigma, rtol=1e-5, atol=1e-7)
    paper.mu, paper.sigma = detector.teacher_mean.flatten().clone(), detector.teacher_std.flatten().clone()

    inputs, library = [], trainer.losses
    trainer.losses = lambda *args, **more: (inputs.append(args[1:4]), library(*args, **more))[1]
    torch.manual_seed(11)
    ours = []
    for draw in trainer.draws():
        ours.append(trainer.train_step(draw))
        trainer.step += 1

    torch.manual_seed(11)  # the autoencoder's dropout is all that draws from it, in the order of memory
    paper.A.train().to(memory_format=torch.channels_last)
    parameters = [*paper.S.parameters(), *paper.A.parameters()]
    by_muon = {  # kernels, but for the first ones of student and autoencoder
        kernel: torch.zeros_like(kernel)
        for kernel in parameters
        if optimiser == "muon" and kernel.dim() == 4 and kernel.shape[1] != 3
    }
    adam = torch.optim.Adam([weight for weight in parameters if weight not in by_muon], lr=1e-3, weight_decay=1e-5)
    for step, (I, I_aug, P) in enumerate(inputs):  # noqa: E741
        assert min((I - single).abs().max() for single in singles) < 1e-6, "a training image, unchanged"
        expected = literal.training_losses(*networks(paper), I.double(), I_aug.double(), P.double())
        for weight in parameters:
            weight.grad = None
        expected["total"].backward()
        adam.step()
        for kernel, average in by_muon.items():
            literal.muon_step(kernel, average, lr=1e-3)
        for name, term in ours[step]._asdict().items():
            torch.testing.assert_close(term, expected[name].detach(), rtol=1e-4, atol=1e-7)
    assert len(inputs) == steps
    trained = [*detector.student.parameters(), *detector.autoencoder.parameters()]
    torch.testing.assert_close(trained, parameters, rtol=1e-3, atol=1e-5)


# --- Algorithm 2 ---------------------------------------------------------------------------------


@EACH_CASE
@torch.no_grad()
def test_maps_and_scores(size, padding, shape):
    detector, paper = both(size, padding, shape)
    held_out = torch.randint(0, 256, (3, 3, *shape), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    calibrate(detector, held_out, batch_size=2)
    singles = [image[None].double() / 255 for image in held_out]
    quantiles = literal.map_quantiles(*networks(paper), singles)
    torch.testing.assert_close(
        detector.quantiles.flatten().double(), torch.tensor(quantiles).double(), rtol=1e-5, atol=0
    )

    images = pictures(2, shape, seed=8)
    images[1][..., 20:40, 30:60] = 1
    maps = detector(torch.cat(images))
    for index, image in enumerate(images):
        expected = literal.score(*networks(paper), quantiles, image, padding)
        for name, found in maps._asdict().items():
            assert found.shape == (2, 1, *shape)
            torch.testing.assert_close(found[[index]].double(), expected[name].double(), rtol=1e-3, atol=1e-4, msg=name)
        assert maps.score[index].item() == pytest.approx(expected["score"], rel=1e-3, abs=1e-4)


@torch.no_grad()
def test_threshold_is_the_highest_score_of_normal_images():
    detector, paper = both("S", False, (64, 64))
    held_out = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    calibrate(detector, held_out, batch_size=3)
    singles = [image[None].double() / 255 for image in held_out]
    quantiles = literal.map_quantiles(*networks(paper), singles)
    scores = [literal.score(*networks(paper), quantiles, image, padded=False)["score"] for image in singles]
    assert detector.threshold == pytest.approx(max(scores), abs=1e-4)


@torch.no_grad()
def test_raw_maps_at_the_papers_size():
    detector, paper = both("S", False, (256, 256), torch.float32)
    (image,) = pictures(1, (256, 256), dtype=torch.float32)
    ours, expected = detector.raw_maps(image), literal.raw_maps(*networks(paper), image)
    for found, reference in zip(ours, expected, strict=True):
        assert found.shape == (1, 1, 56, 56)
        assert_same(found, reference)


@torch.no_grad()
def test_border_is_the_darkest_and_nothing_moves():
    detector = EfficientAD("XS", CHANNELS, image_size=(96, 128)).eval()
    detector.quantiles.copy_(torch.tensor([[0.2, 0.5], [0.3, 0.4]]))
    # One hot cell in otherwise quiet maps: its spot is centred on the cell's field of 33 pixels.
    cells = torch.full((1, 1, 16, 24), 0.1)
    cells[0, 0, 5, 9] = 1
    detector.raw_maps = lambda images: (cells, cells)
    combined = detector(torch.zeros(1, 3, 96, 128)).combined[0, 0]
    row, column = divmod(int(combined.argmax()), 128)
    assert abs(row - (4 * 5 + 16)) <= 2 and abs(column - (4 * 9 + 16)) <= 2
    border = torch.ones_like(combined, dtype=torch.bool)
    border[14:-14, 14:-14] = False
    no_difference = 0.5 * 0.1 * ((0 - 0.2) / 0.3 + (0 - 0.3) / 0.1)
    torch.testing.assert_close(combined[border], torch.full_like(combined[border], no_difference))
    assert combined[~border].min() > no_difference


@torch.no_grad()
def test_maps_that_never_vary_stay_finite():
    detector = EfficientAD("XS", CHANNELS, image_size=(64, 64)).eval()
    constant = torch.full((1, 1, 8, 8), 0.3)
    detector.raw_maps = lambda images: (constant, constant)
    calibrate(detector, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert all(torch.isfinite(part).all() for part in detector(torch.zeros(1, 3, 64, 64)))


def test_detector_refuses_images_below_64_pixels():
    with pytest.raises(ValueError, match=r"\(63, 64\).*at least 64"):
        EfficientAD("XS", CHANNELS, image_size=(63, 64))


# --- Algorithm 3 ---------------------------------------------------------------------------------


class FakeBackbone(torch.nn.Module):
    """Blurred colours as features on the PDN's grid; remembers the images that it was shown."""

    def __init__(self):
        super().__init__()
        self.mix, self.seen = torch.nn.Conv2d(3, CHANNELS, 1).requires_grad_(False), []

    def forward(self, images):
        self.seen.append(images.clone())
        return 40 + 3 * torch.nn.functional.avg_pool2d(self.mix(images), 8)


@pytest.mark.parametrize("padding", [True, False], ids=["padded", "unpadded"])
def test_two_distillation_steps(tmp_path, photographs, monkeypatch, padding):
    torch.manual_seed(0)
    backbone, started = FakeBackbone(), []
    monkeypatch.setattr(distillation.loop, "load_backbone", lambda *args, **more: backbone)
    monkeypatch.setattr(
        distillation.loop, "PDN", lambda *args: (started.append(PDN(*args)), copy.deepcopy(started[0]))[1]
    )
    (tmp_path / "weights").write_bytes(b"of the fake backbone")
    settings = DistillationSettings(
        run_folder=str(tmp_path / "run"),
        channels=CHANNELS,
        backbone_weights=str(tmp_path / "weights"),
        images=str(photographs),
        image_size=(64, 96),
        padding=padding,
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
        statistics_images=5,
        grayscale=0.5,
        device="cpu",
    )
    run = distil(settings)

    T = literal.pdn("S", CHANNELS, padding)
    literal.copy_weights(started[0], T)

    def views(large):
        assert large.shape[1:] == (3, 128, 192), "the backbone sees twice the PDN's size"
        for image in large:
            small = torch.nn.functional.interpolate(image[None], (64, 96), mode="bilinear", antialias=True)
            features = backbone(image[None])
            yield small, features if padding else features[..., 4:-4, 4:-4]

    statistics, steps = backbone.seen[:3], backbone.seen[3:5]
    assert [len(batch) for batch in backbone.seen] == [2, 2, 1, 2, 2]
    mu, sigma = literal.feature_statistics([features for batch in statistics for _, features in views(batch)])
    optimiser = torch.optim.Adam(T.parameters(), lr=1e-3, weight_decay=1e-5)
    losses = []
    for large in steps:
        loss = sum(literal.distillation_loss(T, *view, mu, sigma) for view in views(large)) / len(large)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert run.metrics["losses"] == pytest.approx([sum(losses) / 2], rel=1e-4)
    made = PDN("S", CHANNELS, padding)
    made.load_state_dict(run.load_checkpoint("last")["pdn"])
    differences = [
        (one - other).abs().max().item() for one, other in zip(made.parameters(), T.parameters(), strict=True)
    ]
    # Adam's first steps are about the learning rate's size whatever the gradient; most must agree far closer.
    assert max(differences) <= 2.1e-3
    close = [
        ((one - other).abs() < 1e-5).float().mean().item()
        for one, other in zip(made.parameters(), T.parameters(), strict=True)
    ]
    assert min(close) > 0.97
