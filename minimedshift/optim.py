"""Muon: momentum whose update has all its singular values made equal, for the weights of convolutions.

    M <- momentum M + (1 - momentum) G          the usual running mean of the gradient G
    W <- W - lr sqrt(max(1, rows / columns)) U V^T          with U S V^T the SVD of M, as a matrix (out, in x 3 x 3)

A gradient's few large singular values would drown the many small ones; here each direction moves alike. (K. Jordan et al.
2024, github.com/KellerJordan/Muon.) U V^T comes from five Newton-Schulz steps, which are matrix products only.
"""

import torch


def orthogonalise(m, rounds=5):
    """About U V^T of each matrix m (R, C): singular values between .7 and 1.2. X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if m.shape[0] > m.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay. Every parameter is seen as a matrix (first axis, the rest)."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                m = p.grad.lerp(mean, group["momentum"]).flatten(1)
                scale = max(1, m.shape[0] / m.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalise(m).view(p.shape), alpha=-group["lr"] * scale)


def split(model):
    """The weights Muon is for, and the rest: convolutions inside the network, without its first and last layer."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 4 and not name.startswith(("stem.", "out."))]
    chosen = set(map(id, inside))
    return inside, [p for p in model.parameters() if id(p) not in chosen]
