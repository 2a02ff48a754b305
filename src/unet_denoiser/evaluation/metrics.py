"""Metrics between two sets of features, x (N, D) and y (M, D), in float64 on the features' device.

Everything is computed in blocks of the distance matrix. `feature_extractors.py` makes the features.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BLOCK_ENTRIES = 2**24  # of a distance matrix, in memory at a time: 128 MiB


class Measurement(NamedTuple):
    """A value and its standard error."""

    value: float
    standard_error: float


class PrecisionRecall(NamedTuple):
    """The overlap of two sets; see `manifold_overlap`."""

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Compute the Fréchet distance between Gaussians with the means m and covariances C of x (N, D) and y (M, D).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) (Heusel et al. 2017, equation 6: the FID, if the features are
    Inception's), by torchmetrics. It is biased: for two finite sets of one distribution it is above zero, the more the
    smaller they are. Compare only distances of equal counts (Chong and Forsyth 2020).

    Raises:
        ValueError: features of different widths, or fewer than 2 of them, or values that are not finite.
        ImportError: torchmetrics is not installed.
    """
    _check_features(x, y, at_least=2)
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(f"evaluation needs torchmetrics: pip install 'unet-denoiser[evaluate]' ({error})") from None
    identity = torch.nn.Identity()  # the metric is fed with features instead of images
    identity.num_features = x.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=identity).to(x.device)
    for features, real in ((x, True), (y, False)):
        for part in features.split(4096):
            metric.update(part.double(), real=real)  # its sums and its result take this dtype
    return float(metric.compute())


def kernel_distance(x: Tensor, y: Tensor) -> Measurement:
    """Compute the kernel distance: the unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    Binkowski et al. 2018: the KID, if x (N, D) and y (M, D) are Inception's features. All pairs count, so nothing is
    drawn at random. It has no bias, so it can be negative for sets of one distribution. The standard error is the
    jackknife's, which leaves out each x and each y in turn; for sets of one distribution it is rather too large.

    Raises:
        ValueError: features of different widths, or fewer than 3 of them, or values that are not finite.
    """
    _check_features(x, y, at_least=3)
    n, m = len(x), len(y)
    (xx, _), (yy, _), (xy, yx) = _kernel_sums(x, x), _kernel_sums(y, y), _kernel_sums(x, y)
    # only pairs of different points count
    xx, yy = (sums - (z.double().square().sum(1) / z.shape[1] + 1).pow(3) for z, sums in ((x, xx), (y, yy)))

    def value(sum_xx: Tensor, sum_yy: Tensor, sum_xy: Tensor, n: int, m: int) -> Tensor:
        return sum_xx / (n * (n - 1)) + sum_yy / (m * (m - 1)) - 2 * sum_xy / (n * m)

    without_x = value(xx.sum() - 2 * xx, yy.sum(), xy.sum() - xy, n - 1, m)
    without_y = value(xx.sum(), yy.sum() - 2 * yy, xy.sum() - yx, n, m - 1)
    variance = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    return Measurement(float(value(xx.sum(), yy.sum(), xy.sum(), n, m)), float(variance.sqrt()))


def manifold_overlap(real: Tensor, generated: Tensor, precision_k: int = 3, density_k: int = 5) -> PrecisionRecall:
    """Compute precision, recall, density and coverage of features (N, D) and (M, D).

    Around each point lies a ball that reaches to its k-th nearest neighbour in its own set. Precision is the share of
    generated points in any real ball, recall the share of real points in any generated ball (Kynkaanniemi et al. 2019,
    equation 2, k = 3). Density is the mean number of real balls that hold a generated point, over k; it can exceed 1.
    Coverage is the share of real balls that hold a generated point (Naeem et al. 2020, k = 5).
    Compare only values of equal counts (N = M). `precision_k` is the k of precision and recall, `density_k` that of
    density and coverage.

    Raises:
        ValueError: features of different widths, or not more than k of them, or values that are not finite.
    """
    _check_features(real, generated, at_least=max(precision_k, density_k) + 1)
    radius, wide_radius = _neighbour_distances(real, (precision_k, density_k))
    (generated_radius,) = _neighbour_distances(generated, (precision_k,))
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled, covered, balls = 0, 0, 0
    for part, distances in _distance_blocks(real, generated):
        precise |= (distances <= radius[part, None]).any(0)
        recalled += int((distances <= generated_radius).any(1).sum())
        inside = distances <= wide_radius[part, None]
        covered += int(inside.any(1).sum())
        balls += int(inside.sum())
    n, m = len(real), len(generated)
    return PrecisionRecall(int(precise.sum()) / m, recalled / n, balls / (density_k * m), covered / n)


def nearest_neighbours(x: Tensor, y: Tensor, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the nearest point of y (M, D) for each point of x (N, D).

    Returns distances (N,) in float64 and indices (N,) into y. Pairs of `exclude` (N, M, bool) do not count; a point
    without any other pair has an infinite distance.

    Raises:
        ValueError: features of different widths, or none, or values that are not finite.
    """
    _check_features(x, y, at_least=1)
    indices, missing = [], []
    for part, distances in _distance_blocks(x, y):
        if exclude is not None:
            distances = distances.masked_fill(exclude[part], torch.inf)
        nearest = distances.min(1)
        indices.append(nearest.indices)
        missing.append(nearest.values.isinf())
    found = torch.cat(indices)
    # the blocks' distances lose digits where points nearly coincide
    exact = [(a.double() - b.double()).norm(dim=1) for a, b in zip(x.split(1024), y[found].split(1024), strict=True)]
    return torch.cat(exact).masked_fill(torch.cat(missing), torch.inf), found


def class_accuracy(known: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor]) -> list[float]:
    """Fit a classifier on the features (N, D) and labels (N,) of `known`; return its accuracy on each of the others.

    The classifier is scikit-learn's logistic regression on standardised features.

    Raises:
        ValueError: labels of one class only.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ImportError("class accuracy needs scikit-learn: pip install 'unet-denoiser[evaluate]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no convergence: the held-out images' accuracy shows what it is worth
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
        classifier.fit(known[0].cpu().numpy(), known[1].cpu().numpy())
    return [float(classifier.score(features.cpu().numpy(), labels.cpu().numpy())) for features, labels in others]


def _neighbour_distances(x: Tensor, ks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return the distances (N,) of all points to their k-th nearest other point, for each k."""
    nearest = [distances.topk(max(ks) + 1, largest=False).values for _, distances in _distance_blocks(x, x)]
    return tuple(torch.cat(nearest)[:, k] for k in ks)  # the 0-th is the point itself, or a duplicate of it


def _distance_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of x with their distances to all of y, (n, M).

    From |x|^2 + |y|^2 - 2 x.y, which keeps half of the digits where points nearly coincide: enough in float64.
    """
    centre = y.double().mean(0)
    y = y.double() - centre
    squares = y.square().sum(1)
    for part in _block_slices(len(x), len(y)):
        points = x[part].double() - centre
        yield part, (points.square().sum(1, keepdim=True) + squares - 2 * points @ y.T).clamp(min=0).sqrt()


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the kernel of each x with all of y, (N,), and of each y with all of x, (M,)."""
    y, x_sums, y_sums = y.double(), [], torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for part in _block_slices(len(x), len(y)):
        kernel = ((x[part].double() @ y.T) / x.shape[1] + 1).pow(3)
        x_sums.append(kernel.sum(1))
        y_sums += kernel.sum(0)
    return torch.cat(x_sums), y_sums


def _block_slices(length: int, width: int) -> Iterator[slice]:
    size = max(1, MAX_BLOCK_ENTRIES // width)
    return (slice(start, start + size) for start in range(0, length, size))


def _check_features(x: Tensor, y: Tensor, *, at_least: int) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features have shapes {tuple(x.shape)} and {tuple(y.shape)}; give (N, D) and (M, D)")
    if (fewest := min(len(x), len(y))) < at_least:
        raise ValueError(f"{fewest} images are too few for this figure; it needs at least {at_least} of each kind")
    for features in (x, y):
        if not features.isfinite().all():
            raise ValueError("features must be finite numbers; some are not")
