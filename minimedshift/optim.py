"""Muon: momentum whose update has all its singular values made equal, for the weights of convolutions.

    M <- momentum M + (1 - momentum) G          the usual running mean of the gradient G
    W <- W - lr sqrt(max(1, rows / columns)) U V^T          with U S V^T the SVD of M, as a matrix (out, in x 3 x 3)

A gradient's few large singular values would drown the many small ones; here each direction moves alike. (K. Jordan et al.
2024, github.com/KellerJordan/Muon.) U V^T comes from five Newton-Schulz steps, which are matrix products only.
"""

import torch


def orthogonalise(m, rounds=5):
    """About U V^T of each matrix in m (N, R, C): singular values between .7 and 1.2.

    Newton-Schulz, x <- p(x x^T) x with p(s) = a + b s + c s^2, is done on the small Gram matrix s = x x^T: all factors are polynomials
    in s and commute, so s <- p^2 s, q <- p q, and only the last product q x is as large as m.
    """
    x = m.mT if m.shape[1] > m.shape[2] else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    s = x @ x.mT
    eye = torch.eye(s.shape[1], device=s.device)
    for i in range(rounds):
        p = 3.4445 * eye - 4.7750 * s + 2.0315 * s @ s
        q = p @ q if i else p
        s = p @ p @ s if i < rounds - 1 else None
    x = q @ x
    return x.mT if m.shape[1] > m.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay. Every parameter is seen as a matrix (first axis, the rest)."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same = {}  # parameters of one shape are worked on together
            for p in group["params"]:
                same.setdefault(p.shape, []).append(p)
            for some in same.values():
                means = [self.state[p].setdefault("mean", torch.zeros_like(p)) for p in some]
                grads = [p.grad for p in some]
                torch._foreach_lerp_(means, grads, 1 - group["momentum"])
                m = torch.stack(torch._foreach_lerp(grads, means, group["momentum"])).flatten(2)  # (N, R, C)
                scale = max(1, m.shape[1] / m.shape[2]) ** 0.5
                torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(some, [u.view(p.shape) for u, p in zip(orthogonalise(m), some)], alpha=-group["lr"] * scale)


def split(model):
    """The weights Muon is for, and the rest: convolutions inside the network, without its first and last layer."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 4 and not name.startswith(("stem.", "out."))]
    chosen = set(map(id, inside))
    return inside, [p for p in model.parameters() if id(p) not in chosen]
