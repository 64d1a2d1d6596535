"""The Schrodinger bridge between Gaussians, in closed form."""

import torch


def covariance(d, seed):
    """A positive definite matrix (d, d)."""
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / d**.5
    return root @ root.T + .3 * torch.eye(d, dtype=torch.float64)


def power(a, p):
    """a^p of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(a)
    return vectors * values**p @ vectors.T


def gaussian_bridge(A, B, sigma):
    """Cov(x0, x1) of the Schrodinger bridge of width sigma between N(., A) and N(., B):

        1/2 (A^1/2 D A^-1/2 - sigma^2)

    D = (4 A^1/2 B A^1/2 + sigma^4)^1/2 (arXiv:2006.02572, Theorem 1, whose cost is ||.||^2 with weight
    2 sigma^2)."""
    eye = torch.eye(len(A), dtype=A.dtype)
    D = power(4 * power(A, .5) @ B @ power(A, .5) + sigma**4 * eye, .5)
    return (power(A, .5) @ D @ power(A, -.5) - sigma**2 * eye) / 2
