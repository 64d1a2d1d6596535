"""How weights are trained: Muon, an optimizer, and EMA, their running mean, with which images are translated.

Muon is momentum whose update has all its singular values made equal, for the weights of convolutions.

    M <- momentum M + (1 - momentum) G          the usual running mean of the gradient G
    W <- W - lr sqrt(max(1, rows / columns)) U V^T          U S V^T the SVD of M as a matrix (out, in x 3 x 3)

A gradient's few large singular values would drown the many small ones. Here each direction moves alike.
U V^T comes from five Newton-Schulz steps, which are matrix products only. (github.com/KellerJordan/Muon)"""

import copy

import torch
from torch.optim.adamw import adamw


def orthogonalise(matrices, rounds=5):
    """About U V^T of each matrix (R, C) of a list: singular values between .7 and 1.2.
    Newton-Schulz is x <- p(s) x with s = x x^T, p(s) = a + b s + c s^2. All factors are polynomials in the
    small s and commute, so s <- p^2 s, q <- p q, and only the last product q x is as large as x."""
    turned = [m.mT if m.shape[0] > m.shape[1] else m for m in matrices]  # at least as wide as high
    done = list(turned)
    for side in {len(x) for x in turned}:
        which = [i for i, x in enumerate(turned) if len(x) == side]
        s = torch.stack([turned[i] @ turned[i].mT for i in which])  # (N, R, R)
        square = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-14  # of the norm of x
        s = s / square
        a = 3.4445 * torch.eye(side, device=s.device)
        for i in range(rounds):
            if i:
                s = p @ p @ s
            p = torch.baddbmm(torch.add(a, s, alpha=-4.7750), s, s, alpha=2.0315)
            q = p @ q if i else p
        for i, factor in zip(which, q * square.rsqrt()):
            done[i] = factor @ turned[i]
    return [u.mT if m.shape[0] > m.shape[1] else u for u, m in zip(done, matrices)]


class Muon:
    """Muon with Nesterov momentum for the convolutions (out, in, h, w) of a model, except its first and last
    layer; AdamW, at `slower` of the rate, for the rest. Weight decay is decoupled.
    It is no torch.optim.Optimizer: that imports torch's compiler, which takes two seconds and 140 MB."""

    def __init__(self, model, momentum=0.95, slower=0.05, betas=(0.9, 0.99), weight_decay=0.01):
        self.momentum, self.slower, self.betas, self.weight_decay = momentum, slower, betas, weight_decay
        self.inside, self.rest = [], []
        for name, p in model.named_parameters():
            at_an_end = name.startswith(("stem.", "out.", "enter.", "leave."))
            (self.inside if p.ndim == 4 and not at_an_end else self.rest).append(p)
        self.means = [torch.zeros_like(p) for p in self.inside]
        self.rest_means, self.squares = ([torch.zeros_like(p) for p in self.rest] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in self.rest]

    @torch.no_grad()
    def step(self, lr):
        """Change all weights by their gradients, at the rate lr, a tensor (). The gradients are gone then."""
        grads = [p.grad for p in self.inside]
        torch._foreach_lerp_(self.means, grads, 1 - self.momentum)
        ahead = torch._foreach_lerp(grads, self.means, self.momentum)  # Nesterov
        m = [z.permute(0, 2, 3, 1).flatten(1) for z in ahead]  # no copy of channels-last memory
        torch._foreach_mul_(self.inside, 1 - lr * self.weight_decay)
        before = torch.get_float32_matmul_precision()
        if m[0].is_cuda:  # in TF32 singular values stay below 1.35, in bfloat16 they do not
            torch.set_float32_matmul_precision("high")
        try:
            updates = orthogonalise(m)
        finally:
            torch.set_float32_matmul_precision(before)
        for p, u in zip(self.inside, updates):
            u = u.unflatten(1, (*p.shape[2:], p.shape[1])).permute(0, 3, 1, 2)  # (out, in, h, w) again
            p.sub_(u * (lr * max(1, p.shape[0] / p[0].numel()) ** 0.5))
        adamw(self.rest, [p.grad for p in self.rest], self.rest_means, self.squares, [], self.steps,
              fused=True, amsgrad=False, maximize=False, eps=1e-8, weight_decay=self.weight_decay,
              lr=lr * self.slower, beta1=self.betas[0], beta2=self.betas[1])
        for p in (*self.inside, *self.rest):
            p.grad = None

    def state(self):
        """All that it remembers, for the checkpoint: lists of tensors."""
        return [self.means, self.rest_means, self.squares, self.steps]

    @torch.no_grad()
    def restore(self, state):
        """Go on from a state(). Raises ValueError or RuntimeError where it is another network's."""
        for own, found in zip(self.state(), state, strict=True):
            for x, z in zip(own, found, strict=True):
                x.copy_(z)


class EMA:
    """Running mean of a model's parameters (no buffers), over a constant share of the run so far:

        ema <- beta ema + (1 - beta) theta,    beta = (1 - 1 / step)^(gamma + 1)     arXiv:2312.02696, eq. 127

    At step 1 beta is 0. gamma 6.94 averages over about the last tenth of the steps, 16.97 over a twentieth.
    `model` is a copy of the model in eval mode, which holds the mean; make it before compiling."""

    def __init__(self, model, gamma=16.97):
        self.gamma, self.live = gamma, list(model.parameters())
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, step):
        """Call after optimizer step number `step` = 1, 2, ..."""
        keep = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(list(self.model.parameters()), self.live, 1 - keep)
