"""Algorithms 1-3 of the EfficientAD paper, written down literally: slow, one image at a time, nothing shared.

This file is the yardstick of the tests and imports nothing of effad_lib. Names are the paper's: T, S, A are
teacher, student and autoencoder, I a training image, I_aug its augmentation, P a natural image. Where the
paper is silent (images below 256x256 in the autoencoder) the choice is marked "our choice".
"""

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor, nn

# --- networks --------------------------------------------------------------


def normalise(image: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (image - mean.to(image)) / deviation.to(image)


def pdn_small(out_channels: int = 384, padded: bool = False) -> nn.Sequential:
    p = 1 if padded else 0
    return nn.Sequential(
        nn.Conv2d(3, 128, kernel_size=4, stride=1, padding=3 * p),
        nn.ReLU(),
        nn.AvgPool2d(kernel_size=2, stride=2, padding=p),
        nn.Conv2d(128, 256, kernel_size=4, stride=1, padding=3 * p),
        nn.ReLU(),
        nn.AvgPool2d(kernel_size=2, stride=2, padding=p),
        nn.Conv2d(256, 256, kernel_size=3, stride=1, padding=p),
        nn.ReLU(),
        nn.Conv2d(256, out_channels, kernel_size=4, stride=1, padding=0),
    )


def pdn_medium(out_channels: int = 384, padded: bool = False) -> nn.Sequential:
    p = 1 if padded else 0
    return nn.Sequential(
        nn.Conv2d(3, 256, kernel_size=4, stride=1, padding=3 * p),
        nn.ReLU(),
        nn.AvgPool2d(kernel_size=2, stride=2, padding=p),
        nn.Conv2d(256, 512, kernel_size=4, stride=1, padding=3 * p),
        nn.ReLU(),
        nn.AvgPool2d(kernel_size=2, stride=2, padding=p),
        nn.Conv2d(512, 512, kernel_size=1, stride=1, padding=0),
        nn.ReLU(),
        nn.Conv2d(512, 512, kernel_size=3, stride=1, padding=p),
        nn.ReLU(),
        nn.Conv2d(512, out_channels, kernel_size=4, stride=1, padding=0),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, kernel_size=1, stride=1, padding=0),
    )


def pdn(size: str, out_channels: int = 384, padded: bool = False) -> nn.Sequential:
    return {"S": pdn_small, "M": pdn_medium}[size](out_channels, padded)


class LiteralAutoencoder(nn.Module):
    def __init__(self, out_channels: int = 384):
        super().__init__()
        self.enconv1 = nn.Conv2d(3, 32, kernel_size=4, stride=2, padding=1)
        self.enconv2 = nn.Conv2d(32, 32, kernel_size=4, stride=2, padding=1)
        self.enconv3 = nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1)
        self.enconv4 = nn.Conv2d(64, 64, kernel_size=4, stride=2, padding=1)
        self.enconv5 = nn.Conv2d(64, 64, kernel_size=4, stride=2, padding=1)
        self.enconv6 = nn.Conv2d(64, 64, kernel_size=8, stride=1, padding=0)
        self.deconv1 = nn.Conv2d(64, 64, kernel_size=4, stride=1, padding=2)
        self.deconv2 = nn.Conv2d(64, 64, kernel_size=4, stride=1, padding=2)
        self.deconv3 = nn.Conv2d(64, 64, kernel_size=4, stride=1, padding=2)
        self.deconv4 = nn.Conv2d(64, 64, kernel_size=4, stride=1, padding=2)
        self.deconv5 = nn.Conv2d(64, 64, kernel_size=4, stride=1, padding=2)
        self.deconv6 = nn.Conv2d(64, 64, kernel_size=4, stride=1, padding=2)
        self.deconv7 = nn.Conv2d(64, 64, kernel_size=3, stride=1, padding=1)
        self.deconv8 = nn.Conv2d(64, out_channels, kernel_size=3, stride=1, padding=1)

    def forward(self, image: Tensor, output_size: tuple[int, int]) -> Tensor:
        """image [1, 3, H, W] normalised, output_size (h, w) of the PDN -> [1, out_channels, h, w]."""
        H, W = image.shape[-2:]
        x = F.relu(self.enconv1(image))
        x = F.relu(self.enconv2(x))
        x = F.relu(self.enconv3(x))
        x = F.relu(self.enconv4(x))
        x = F.relu(self.enconv5(x))
        x = self.enconv6(zero_pad_to_8(x))
        x = self.decode(self.deconv1, x, H // 64 - 1, W // 64 - 1)
        x = self.decode(self.deconv2, x, H // 32, W // 32)
        x = self.decode(self.deconv3, x, H // 16 - 1, W // 16 - 1)
        x = self.decode(self.deconv4, x, H // 8, W // 8)
        x = self.decode(self.deconv5, x, H // 4 - 1, W // 4 - 1)
        x = self.decode(self.deconv6, x, H // 2 - 1, W // 2 - 1)
        x = F.interpolate(x, size=output_size, mode="bilinear", align_corners=False)
        x = F.relu(self.deconv7(x))
        return self.deconv8(x)

    def decode(self, convolution: nn.Conv2d, x: Tensor, height: int, width: int) -> Tensor:
        size = (max(height, 1), max(width, 1))  # H/64-1 vanishes below 128: our choice is one cell
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return F.dropout(F.relu(convolution(x)), p=0.2, training=self.training)


def zero_pad_to_8(x: Tensor) -> Tensor:
    """Below 256x256 the encoder ends in less than 8x8 cells; our choice: zeros around them."""
    rows, columns = max(8 - x.shape[-2], 0), max(8 - x.shape[-1], 0)
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


# --- Algorithm 1: student and autoencoder ----------------------------------


def teacher_statistics(T: nn.Module, images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every teacher channel over all training images, in two passes and float64."""
    with torch.no_grad():
        outputs = [T(normalise(image))[0].double() for image in images]
    mu, sigma = [], []
    for c in range(outputs[0].shape[0]):
        values = torch.cat([output[c].flatten() for output in outputs])
        mean = values.sum() / len(values)
        mu.append(mean)
        sigma.append((((values - mean) ** 2).sum() / len(values)).sqrt())
    return torch.stack(mu), torch.stack(sigma)


def T_hat(T: nn.Module, image: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    with torch.no_grad():
        return (T(normalise(image)) - mu.to(image).view(1, -1, 1, 1)) / sigma.to(image).view(1, -1, 1, 1)


def quantile(values: Tensor, q: float) -> float:
    """Linear interpolation between order statistics, in float64; torch refuses more than 2**24 elements."""
    values = values.detach().double().flatten()
    if values.numel() > 2**24:
        return float(np.quantile(values.numpy(), q))
    return float(torch.quantile(values, q))


def hard_loss(teacher: Tensor, student: Tensor, p_hard: float = 0.999) -> Tensor:
    D = (teacher - student) ** 2
    d_hard = quantile(D, p_hard)
    return D[D.double() >= d_hard].mean()


def augment(image: Tensor, kind: str, factor: float) -> Tensor:
    """Exactly one of the three colour changes, image [1, 3, H, W] in [0, 1]."""
    if kind == "brightness":
        return TF.adjust_brightness(image, factor)
    if kind == "contrast":
        return TF.adjust_contrast(image, factor)
    if kind == "saturation":
        return TF.adjust_saturation(image, factor)
    raise ValueError(kind)


def training_losses(T, S, A, mu, sigma, I, I_aug, P, p_hard: float = 0.999) -> dict[str, Tensor]:  # noqa: E741
    """One step of Algorithm 1 on one image: three separate passes of the whole student."""
    C = len(mu)
    target = T_hat(T, I, mu, sigma)
    L_hard = hard_loss(target, S(normalise(I))[:, :C], p_hard)
    L_pen = (S(normalise(P))[:, :C] ** 2).mean()
    L_ST = L_hard + L_pen

    target = T_hat(T, I_aug, mu, sigma)
    reconstruction = A(normalise(I_aug), target.shape[-2:])
    L_AE = ((target - reconstruction) ** 2).mean()
    L_STAE = ((reconstruction - S(normalise(I_aug))[:, C:]) ** 2).mean()
    return {
        "hard": L_hard,
        "penalty": L_pen,
        "autoencoder": L_AE,
        "student_autoencoder": L_STAE,
        "total": L_ST + L_AE + L_STAE,
    }


# --- Algorithm 2: scoring --------------------------------------------------


def raw_maps(T, S, A, mu, sigma, image: Tensor) -> tuple[Tensor, Tensor]:
    """image [1, 3, H, W] -> M_ST and M_AE, each [1, 1, h, w] on the grid of the PDN."""
    C = len(mu)
    with torch.no_grad():
        teacher = T_hat(T, image, mu, sigma)
        student = S(normalise(image))
        autoencoder = A(normalise(image), teacher.shape[-2:])
    M_ST = ((teacher - student[:, :C]) ** 2).mean(dim=1, keepdim=True)
    M_AE = ((autoencoder - student[:, C:]) ** 2).mean(dim=1, keepdim=True)
    return M_ST, M_AE


def map_quantiles(T, S, A, mu, sigma, held_out: list[Tensor]) -> tuple[float, float, float, float]:
    """q_a and q_b of M_ST, then of M_AE, over every raw value of the held-out normal images."""
    pairs = [raw_maps(T, S, A, mu, sigma, image) for image in held_out]
    X_ST = torch.cat([M_ST.flatten() for M_ST, _ in pairs])
    X_AE = torch.cat([M_AE.flatten() for _, M_AE in pairs])
    return quantile(X_ST, 0.9), quantile(X_ST, 0.995), quantile(X_AE, 0.9), quantile(X_AE, 0.995)


def score(T, S, A, mu, sigma, quantiles, image: Tensor, padded: bool) -> dict[str, Tensor | float]:
    """Algorithm 2 on one image: normalised maps at the image's size, their mean, and its maximum."""
    qa_ST, qb_ST, qa_AE, qb_AE = quantiles
    M_ST, M_AE = raw_maps(T, S, A, mu, sigma, image)
    if not padded:  # raw zero is "no difference", which the normalisation puts below everything else
        M_ST, M_AE = F.pad(M_ST, (4, 4, 4, 4)), F.pad(M_AE, (4, 4, 4, 4))
    M_ST = F.interpolate(M_ST, size=image.shape[-2:], mode="bilinear", align_corners=False)
    M_AE = F.interpolate(M_AE, size=image.shape[-2:], mode="bilinear", align_corners=False)
    M_ST = 0.1 * (M_ST - qa_ST) / (qb_ST - qa_ST)
    M_AE = 0.1 * (M_AE - qa_AE) / (qb_AE - qa_AE)
    combined = 0.5 * M_ST + 0.5 * M_AE
    return {
        "combined": combined,
        "student_teacher": M_ST,
        "student_autoencoder": M_AE,
        "score": float(combined.max()),
    }


# --- Algorithm 3: distillation ---------------------------------------------


def feature_statistics(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every backbone channel; features: list of [1, C, h, w]."""
    mu, sigma = [], []
    for c in range(features[0].shape[1]):
        values = torch.cat([f[0, c].double().flatten() for f in features])
        mean = values.sum() / len(values)
        mu.append(mean)
        sigma.append((((values - mean) ** 2).sum() / len(values)).sqrt())
    return torch.stack(mu), torch.stack(sigma)


def distillation_loss(T: nn.Module, image: Tensor, features: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared error of the PDN on image [1, 3, H, W] to standardised backbone features [1, C, h, w]."""
    target = (features - mu.to(features).view(1, -1, 1, 1)) / sigma.to(features).view(1, -1, 1, 1)
    return ((target - T(normalise(image))) ** 2).mean()


# --- Muon, which is not the paper's ----------------------------------------


def muon_step(weight: Tensor, average: Tensor, lr: float, momentum: float = 0.95, weight_decay: float = 1e-5) -> None:
    """One step on a kernel [out, in, h, w] with its gradient, both it and its running mean of gradients in place.

    Jordan et al. (2024), with updates of Adam's size (Liu et al., arXiv 2502.16982, section 2.2) and each step of the
    quintic written out.
    """
    average.copy_(momentum * average + (1 - momentum) * weight.grad)
    X = ((1 - momentum) * weight.grad + momentum * average).reshape(len(weight), -1)
    X = X / (X**2).sum().sqrt()
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * (X @ X.T @ X) + 2.0315 * (X @ X.T @ X @ X.T @ X)
    with torch.no_grad():
        weight -= lr * (weight_decay * weight + 0.2 * max(X.shape) ** 0.5 * X.reshape(weight.shape))


# --- for the tests ---------------------------------------------------------


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters in their order; a different number, order or shape of them is a failure."""
    pairs = list(zip(source.named_parameters(), target.named_parameters(), strict=True))
    for (name, value), (other_name, other) in pairs:
        assert value.shape == other.shape, f"{name} {tuple(value.shape)} against {other_name} {tuple(other.shape)}"
    with torch.no_grad():
        for (_, value), (_, other) in pairs:
            other.copy_(value)
