"""What two sets of features (N, D) and (M, D) have to do with each other: Fréchet and kernel distance, precision and
recall, nearest neighbours, classes.

What features are is settled in `features.py`. Everything is computed in float64, in blocks of rows, on the device that
the features are on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 2**24  # entries of a matrix of distances that are held at a time: 128 MiB


class Measurement(NamedTuple):
    """A figure and its standard error."""

    value: float
    standard_error: float


class PrecisionRecall(NamedTuple):
    """How two sets overlap; see `manifold_overlap`."""

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The Fréchet distance between Gaussians with the sets' means and covariances, by torchmetrics.

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)). It is biased: of two finite sets from one distribution it is not
    zero, and the fewer there are the larger it is, so that figures compare only at equal counts (Heusel et al. 2017,
    equation 6; the bias: Chong and Forsyth 2020).

    Args:
        x, y: features (N, D) and (M, D).

    Raises:
        ValueError: sets that are no features of one kind, or have fewer than 2 rows.
        ImportError: torchmetrics is not there.
    """
    x, y = _checked(x, y, 2)
    metric = _torchmetrics_frechet(x.shape[1]).to(x.device)
    for features, real in ((x, True), (y, False)):
        for part in features.split(4096):
            metric.update(part.double(), real=real)  # in float64, and so is what it returns
    return float(metric.compute())


def kernel_distance(x: Tensor, y: Tensor) -> Measurement:
    """The kernel distance: the squared maximum mean discrepancy for the kernel (x.y / D + 1)^3, without bias.

    All pairs count, so nothing is drawn at random. Being without bias it may be negative for sets that are alike. The
    standard error is the jackknife's, each x and each y left out in turn; where both sets are of one distribution it is
    on the large side. (Binkowski et al. 2018, section 3.2: the KID, where the features are Inception's.)

    Args:
        x, y: features (N, D) and (M, D).

    Raises:
        ValueError: sets that are no features of one kind, or have fewer than 3 rows.
    """
    x, y = _checked(x, y, 3)
    n, m = len(x), len(y)
    (xx, _), (yy, _), (xy, yx) = _kernel_sums(x, x), _kernel_sums(y, y), _kernel_sums(x, y)
    xx, yy = xx - _kernel_diagonal(x), yy - _kernel_diagonal(y)  # only pairs of different points count

    def value(sum_xx: Tensor, sum_yy: Tensor, sum_xy: Tensor, n: int, m: int) -> Tensor:
        return sum_xx / (n * (n - 1)) + sum_yy / (m * (m - 1)) - 2 * sum_xy / (n * m)

    without_x = value(xx.sum() - 2 * xx, yy.sum(), xy.sum() - xy, n - 1, m)
    without_y = value(xx.sum(), yy.sum() - 2 * yy, xy.sum() - yx, n, m - 1)
    variance = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    return Measurement(float(value(xx.sum(), yy.sum(), xy.sum(), n, m)), float(variance.sqrt()))


def manifold_overlap(real: Tensor, generated: Tensor, precision_k: int = 3, density_k: int = 5) -> PrecisionRecall:
    """Precision, recall, density and coverage: how far the balls around the points of one set hold those of the other.

    Around each point lies a ball that reaches to its k-th nearest neighbour in its own set. Precision is the share of
    generated points in any ball of a real one, recall the share of real points in any ball of a generated one
    (Kynkaanniemi et al. 2019, k = 3). Density is the mean number of real balls that a generated point is in, divided by
    k, and may exceed 1; coverage is the share of real balls that hold a generated point (Naeem et al. 2020, k = 5).

    Args:
        real, generated: features (N, D) and (M, D); figures compare only at equal counts.
        precision_k: k of precision and recall.
        density_k: k of density and coverage.

    Raises:
        ValueError: sets that are no features of one kind, or have no more rows than k.
    """
    real, generated = _checked(real, generated, max(precision_k, density_k) + 1)
    radius, wide_radius = _radii(real, (precision_k, density_k))
    (generated_radius,) = _radii(generated, (precision_k,))
    held = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled, covered, balls = 0, 0, 0
    for rows, distances in _distances(real, generated):
        held |= (distances <= radius[rows, None]).any(0)
        recalled += int((distances <= generated_radius).any(1).sum())
        inside = distances <= wide_radius[rows, None]
        covered += int(inside.any(1).sum())
        balls += int(inside.sum())
    n, m = len(real), len(generated)
    return PrecisionRecall(int(held.sum()) / m, recalled / n, balls / (density_k * m), covered / n)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x its distance to the nearest row of y, and that row's index: (N,) float64 and (N,) int64."""
    x, y = _checked(x, y, 1)
    indices = torch.cat([distances.argmin(1) for _, distances in _distances(x, y)])
    exact = [(a.double() - b.double()).norm(dim=1) for a, b in zip(x.split(1024), y[indices].split(1024), strict=True)]
    return torch.cat(exact), indices


def class_accuracy(known: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor]) -> list[float]:
    """How often a classifier of features finds the labels: logistic regression of scikit-learn, on standardised ones.

    Args:
        known: the features (N, D) and labels (N,) that it learns from.
        others: pairs of those that it is asked about.

    Returns:
        The share of right answers for each pair.

    Raises:
        ValueError: labels of one class only.
        ImportError: scikit-learn is not there.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ImportError("class accuracy needs scikit-learn: pip install 'unet-denoiser[evaluate]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged: what it is worth is measured
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
        classifier.fit(known[0].cpu().numpy(), known[1].cpu().numpy())
    return [float(classifier.score(features.cpu().numpy(), labels.cpu().numpy())) for features, labels in others]


def _radii(x: Tensor, ks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The distance of each row to its k-th nearest other row, for each k."""
    found = [distances.topk(max(ks) + 1, largest=False).values for _, distances in _distances(x, x)]
    return tuple(torch.cat(found)[:, k] for k in ks)  # the 0-th is the row itself, or a duplicate of it


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x, and their distances to all of y.

    By |x|^2 + |y|^2 - 2 x.y, which keeps half of the digits where points nearly coincide: enough in float64.
    """
    centre = y.double().mean(0)
    y = y.double() - centre
    squares = y.square().sum(1)
    for rows in _blocks(len(x), len(y)):
        part = x[rows].double() - centre
        yield rows, (part.square().sum(1, keepdim=True) + squares - 2 * part @ y.T).clamp(min=0).sqrt()


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) sums of the kernel of each row of x with all of y, and (M,) of each row of y with all of x."""
    y, rows_sums, column_sums = y.double(), [], torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for rows in _blocks(len(x), len(y)):
        kernel = ((x[rows].double() @ y.T) / x.shape[1] + 1).pow(3)
        rows_sums.append(kernel.sum(1))
        column_sums += kernel.sum(0)
    return torch.cat(rows_sums), column_sums


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.double().square().sum(1) / x.shape[1] + 1).pow(3)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, BLOCK // columns)
    return (slice(start, start + size) for start in range(0, rows, size))


def _checked(x: Tensor, y: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features have shapes {tuple(x.shape)} and {tuple(y.shape)}; give (N, D) and (M, D)")
    if (fewest := min(len(x), len(y))) < at_least:
        raise ValueError(f"{fewest} images are too few for this figure; it needs at least {at_least} of each kind")
    for features in (x, y):
        if not features.isfinite().all():
            raise ValueError("features must be finite numbers; some are not")
    return x, y


def _torchmetrics_frechet(width: int) -> Any:
    """torchmetrics' metric, fed with features instead of images."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(f"evaluation needs torchmetrics: pip install 'unet-denoiser[evaluate]' ({error})") from None
    identity = torch.nn.Identity()
    identity.num_features = width  # type: ignore[assignment]
    return FrechetInceptionDistance(feature=identity)
