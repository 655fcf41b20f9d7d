"""Networks that the systems train or tune."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, interpolate


class ExampleWeights(nn.Module):
    """A weight between 0 and 1 for each training example, whatever it looks like."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(examples))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.logits.sigmoid()


class WeightNet(nn.Module):
    """A weight between 0 and 1 from an image and its label: one output per class, of which the label picks its own."""

    def __init__(self, pixels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(pixels, width), nn.Tanh(), nn.Linear(width, classes))
        nn.init.zeros_(self.layers[-1].weight)  # so that all weights start at one half
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.layers(x).gather(1, y[:, None])[:, 0].sigmoid()


def small_cnn(channels: int, side: int, classes: int = 10) -> nn.Sequential:
    """Return two convolutions with strides and a linear layer; 28,938 weights for MNIST."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, classes),
    )


class Augmentation(nn.Module):
    """The paper's augmentation: x + tanh(U(x, noise)), with a U-Net of depth 2 and a number of noise per image.

    It starts as the identity, since the last layer of the U-Net starts at zero.
    """

    def __init__(self, channels: int, filters: int = 8) -> None:
        super().__init__()
        self.down = _convolutions(channels + 1, filters)
        self.bottom = nn.Sequential(nn.MaxPool2d(2), _convolutions(filters, 2 * filters))
        self.up = nn.ConvTranspose2d(2 * filters, filters, 2, stride=2)
        self.merge = _convolutions(2 * filters, filters)
        self.last = nn.Conv2d(filters, channels, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        noise = noise[:, None, None, None].expand(-1, 1, *x.shape[2:])
        fine = self.down(torch.cat([x, noise], 1))
        merged = self.merge(torch.cat([self.up(self.bottom(fine)), fine], 1))
        return x + self.last(merged).tanh()

    def noise(self, images: int) -> torch.Tensor:
        """Return random numbers for so many images."""
        return torch.randn(images)

    def numbers(self) -> dict[str, float]:
        """Return what a history keeps: nothing."""
        return {}


MAGNITUDES = ("rotation", "right", "down", "size", "shear x", "shear y", "elastic")


class Warp(nn.Module):
    """A random affine and elastic deformation, with a magnitude for each of its kinds.

    Magnitudes are standard deviations: radians for the rotation, halves of the image for the translations and the
    elastic displacements, logarithms for the size. Their logarithms are the parameters.
    """

    COARSE = 4  # the elastic displacements are smooth: drawn on a grid of this side, and interpolated
    PADDING = "zeros"  # what lies beyond the edges

    def __init__(self, magnitudes: Sequence[float]) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor(magnitudes).log())

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        magnitudes = self.logs.exp()
        turn, right, down, larger, shear_x, shear_y = (magnitudes[:6] * noise[:, :6]).T
        cosine, sine, size = turn.cos(), turn.sin(), larger.exp()
        first = torch.stack([size * cosine, shear_x - sine, right], 1)
        second = torch.stack([shear_y + sine, size * cosine, down], 1)
        grid = affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
        elastic = noise[:, 6:].view(-1, 2, self.COARSE, self.COARSE)
        elastic = interpolate(elastic, list(x.shape[2:]), mode="bicubic", align_corners=False)
        grid = grid + magnitudes[6] * elastic.movedim(1, -1)
        return grid_sample(x, grid, padding_mode=self.PADDING, align_corners=False)

    def noise(self, images: int) -> torch.Tensor:
        """Return random numbers for so many images."""
        return torch.randn(images, 6 + 2 * self.COARSE**2)

    def numbers(self) -> dict[str, float]:
        """Return what a history keeps: the magnitudes, by name."""
        return dict(zip(MAGNITUDES, self.logs.detach().exp().tolist(), strict=True))


class MirrorWarp(Warp):
    """A warp for photographs, which have no background: beyond an edge lies the image again, mirrored."""

    PADDING = "reflection"


def _convolutions(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 3, padding=1), nn.ReLU()
    )


def linear(inputs: int) -> nn.Module:
    """Return logistic regression on images of so many pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10))


def mlp(inputs: int) -> nn.Module:
    """Return a network with one hidden layer, as wide as the image has pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, 10))


def cnn(channels: int, size: int) -> nn.Module:
    """Return two convolutions and two dense layers, for square images of a size that 4 divides."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def alexnet(channels: int, size: int) -> nn.Module:
    """Return five convolutions and three dense layers like AlexNet's, narrow, for square images that 8 divides."""
    layers: list[nn.Module] = []
    for before, after, pool in ((channels, 32, 2), (32, 96, 2), (96, 192, 1), (192, 128, 1), (128, 128, 2)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(pool)]
    dense = [nn.Linear(128 * (size // 8) ** 2, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, normalised by groups: unlike batches', their statistics are no state."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.GroupNorm(8, after),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def resnet8(channels: int) -> nn.Module:
    """Return a residual network of eight layers, 16, 32 and 64 channels wide."""
    blocks = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
    start = (nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.GroupNorm(8, 16), nn.ReLU())
    return nn.Sequential(*start, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
