"""Distances between sets of features against closed forms, torchmetrics, prdc and plain loops."""

import math

import pytest
import torch
from prdc import compute_prdc
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.neighbors import NearestNeighbors
from torch.testing import assert_close
from torchmetrics.image.kid import poly_mmd

from unet_denoiser.evaluation import metrics
from unet_denoiser.evaluation.metrics import (
    class_accuracy,
    frechet_distance,
    kernel_distance,
    manifold_overlap,
    nearest_neighbours,
)


def with_moments(mean, covariance, count=200):
    """Points with exactly these sample moments."""
    z = torch.randn(count, len(mean), dtype=torch.float64)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    return z @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_has_a_closed_form():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for covariances that commute."""
    mean, rotation = torch.tensor([3.0, -1.0, 0.5]).double(), torch.linalg.qr(torch.randn(3, 3).double()).Q
    first, second = torch.tensor([1.0, 2.0, 0.1]).double(), torch.tensor([0.5, 2.5, 4.0]).double()
    x = with_moments(mean, rotation @ first.square().diag() @ rotation.T)
    y = with_moments(-mean, rotation @ second.square().diag() @ rotation.T, 300)
    expected = (2 * mean).square().sum() + (first - second).square().sum()
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """tr (A B)^(1/2) from the symmetric square root of A: sum of the roots of the eigenvalues of A^(1/2) B A^(1/2)."""
    a, b = (torch.cov(torch.randn(4, 9).double()) for _ in range(2))
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    expected = a.trace() + b.trace() - 2 * torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
    zero = torch.zeros(4).double()
    assert frechet_distance(with_moments(zero, a), with_moments(zero, b)) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_distance_is_exact_for_features_far_from_zero():
    x = torch.randn(500, 6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x + 1000, x + 1001) == pytest.approx(6, rel=1e-3)


def test_frechet_distance_has_the_bias_that_is_written_about():
    few, many = (frechet_distance(torch.randn(n, 50), torch.randn(n, 50)) for n in (100, 1000))
    assert few > 5 * many > 0


def test_kernel_distance_is_torchmetrics_over_all_samples():
    x, y = torch.randn(60, 7), torch.randn(60, 7) + 0.2
    assert kernel_distance(x, y).value == pytest.approx(poly_mmd(x.double(), y.double()).item(), rel=1e-10)


def test_kernel_distance_by_a_plain_loop_for_unequal_counts(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_BLOCK_ENTRIES", 40)  # several blocks
    x, y = torch.randn(11, 3).double(), torch.randn(8, 3).double()

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    def plain(x, y):
        of_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (len(x) * (len(x) - 1))
        of_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (len(y) * (len(y) - 1))
        return of_x + of_y - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))

    def without(z, i):
        return torch.cat([z[:i], z[i + 1 :]])

    found = kernel_distance(x, y)
    assert found.value == pytest.approx(plain(x, y), rel=1e-10)
    of_x = torch.tensor([plain(without(x, i), y) for i in range(len(x))])
    of_y = torch.tensor([plain(x, without(y, i)) for i in range(len(y))])
    variance = sum((len(v) - 1) / len(v) * (v - v.mean()).square().sum() for v in (of_x, of_y))
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-4)


def test_kernel_distance_has_no_bias_and_a_standard_error_that_is_one():
    """Over many draws: sets alike have 0 in the mean; the error is the spread over draws, or somewhat more."""
    draws = [
        (*kernel_distance(torch.randn(80, 4), torch.randn(120, 4)), *kernel_distance(torch.randn(80, 4), shifted()))
        for _ in range(150)
    ]
    alike, alike_error, apart, apart_error = torch.tensor(draws).T
    assert abs(alike.mean()) < 3 * alike.std() / math.sqrt(len(draws))
    assert alike.std() < alike_error.mean() < 2 * alike.std()
    assert 0.85 * apart.std() < apart_error.mean() < 1.4 * apart.std()
    assert apart.mean() > 5 * apart_error.mean() / math.sqrt(len(draws))


def shifted():
    return torch.randn(120, 4) + 0.7


def test_manifold_overlap_is_prdc(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_BLOCK_ENTRIES", 1000)
    real, generated = torch.randn(150, 6), 1.2 * torch.randn(130, 6) + 0.3
    for k in (3, 5):
        theirs = compute_prdc(real.numpy(), generated.numpy(), k)
        found = manifold_overlap(real, generated, k, k)._asdict()
        assert found == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-12)


def test_manifold_overlap_of_known_points():
    """Real points 0, 1, ... 9 with balls of radius 1 (k = 1, but 0 and 9 alike), generated ones beside each other."""
    real = torch.arange(10.0)[:, None]
    far = torch.tensor([[100.0], [101.0]])
    assert manifold_overlap(real, far, 1, 1) == (0, 0, 0, 0)
    inside = torch.tensor([[4.4], [4.6]])
    assert manifold_overlap(real, inside, 1, 1) == (1, 0, 2, 0.2)  # in the balls of 4 and 5; theirs hold no real one
    assert manifold_overlap(real, real, 1, 1) == (1, 1, 2.8, 1)


def test_nearest_neighbours():
    x, y = torch.randn(40, 5), torch.randn(90, 5)
    distances, indices = nearest_neighbours(x, y)
    theirs, distances_of_theirs = pairwise_distances_argmin_min(x.double().numpy(), y.double().numpy())
    assert indices.tolist() == theirs.tolist()
    assert_close(distances.numpy(), distances_of_theirs, rtol=1e-10, atol=0)
    distances, indices = nearest_neighbours(y[7:9] + 0, y)
    assert (distances.tolist(), indices.tolist()) == ([0, 0], [7, 8])  # copies are at no distance at all


def test_nearest_neighbours_without_excluded_pairs():
    """As scikit-learn's second neighbour of a set in itself; infinite where every pair is excluded."""
    x = torch.randn(30, 4)
    distances, indices = nearest_neighbours(x, x, exclude=torch.eye(30, dtype=torch.bool))
    theirs, their_indices = NearestNeighbors(n_neighbors=2).fit(x.double().numpy()).kneighbors(x.double().numpy())
    assert indices.tolist() == their_indices[:, 1].tolist()
    assert_close(distances.numpy(), theirs[:, 1], rtol=1e-10, atol=0)
    assert nearest_neighbours(x[:1], x[:1], exclude=torch.ones(1, 1, dtype=torch.bool))[0].item() == math.inf


def test_class_accuracy_of_separable_and_of_meaningless_features():
    labels = torch.arange(300) % 3
    clear, noise = torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(300, 3), torch.randn(300, 3)
    wrong = (labels + 1) % 3
    assert class_accuracy((clear, labels), (clear, labels), (clear, wrong)) == [1.0, 0.0]
    (found,) = class_accuracy((noise[:150], labels[:150]), (noise[150:], labels[150:]))
    assert 0.15 < found < 0.5


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, manifold_overlap, nearest_neighbours])
def test_refusals(metric):
    with pytest.raises(ValueError, match=r"shapes \(9, 2\) and \(9, 3\)"):
        metric(torch.randn(9, 2), torch.randn(9, 3))
    with pytest.raises(ValueError, match="0 images are too few"):
        metric(torch.randn(9, 2), torch.randn(0, 2))
    with pytest.raises(ValueError, match="finite"):
        metric(torch.randn(9, 2), torch.full((9, 2), math.nan))
