"""Learned rivals with code of their own.

SDEdit (arXiv:2108.01073) adds noise to the picture and denoises it under the target's label. Supervision, the
ceiling, learns from pairs. (Others are train.py with other flags: see study.py.)

The CycleGAN (arXiv:1703.10593) has local generators: a pixel sees only what is near it, so anatomy stays.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from minimedshift import sampler
from minimedshift.flow import draw_noise
from minimedshift.model import Shape, UNet
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from minimedshift.support.log import progress
from minimedshift.support.trust import check_weights

# ---------------------------------------------------------------- SDEdit

def sdedit(model, x1, y_target, tau, guidance=1.0, steps=20, solver="heun", end=1.0, colour=0.0, seed=0):
    """SDEdit (arXiv:2108.01073, Alg. 1): fresh noise down to time tau, then generate in the target domain.

        xt = a x1 + b x0,   a = tau / end,   b^2 = (1 - tau)^2 - a^2 (1 - end)^2
        end = 1:   xt = tau x1 + (1 - tau) x0

    x1 (B, C, H, W): source images. They count as xt at t = end, so they hold a part of the noise already.
    y_target: int or (B,). x0 is drawn on the host from `seed`, the same on every machine.
    """
    x0 = draw_noise(x1.shape, torch.Generator().manual_seed(seed), colour).to(x1)
    a = tau / end
    b = math.sqrt((1 - tau) ** 2 - (a * (1 - end)) ** 2)
    xt = a * x1 + b * x0
    generator = torch.Generator(x1.device).manual_seed(seed)
    return sampler.decode(model, xt, y_target, tau, guidance, steps, solver, end, colour, generator)


# ---------------------------------------------------------------- the networks of the CycleGAN

class Residual(nn.Module):
    """x + conv2(silu(conv1(silu(x)))). No normalisation: it would look at the whole image."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Generator(nn.Module):
    """x + net(x) for x (B, C, H, W), H and W even; the identity at the start. It works at half resolution.
    A pixel depends on those at most 4 blocks + 5 pixels away: anatomy cannot be redrawn."""

    def __init__(self, channels=1, width=48, blocks=4):
        super().__init__()
        self.config = dict(channels=channels, width=width, blocks=blocks)
        self.enter = nn.Conv2d(4 * channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Residual(width) for _ in range(blocks)])
        self.leave = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x):
        h = self.blocks(self.enter(F.pixel_unshuffle(x, 2)))
        return x + F.pixel_shuffle(self.leave(F.silu(h)), 2).float()


def judge(channels, width=32):
    """A PatchGAN discriminator (arXiv:1611.07004), a mark for each patch of 34 x 34 pixels.
    (B, C, H, W) -> (B, 1, ~H / 4, ~W / 4)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 4, 1, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(4 * width, 1, 4, 1, 1))


# ---------------------------------------------------------------- training without pairs

def off(mark, wanted):
    """How far the marks of a judge are from 1 (real) or 0 (translated), squared (arXiv:1611.04076)."""
    return (mark.float() - wanted).square().mean()


def adversarial(source, target, steps, batch_size=4, lr=1e-3, cycle=3.0, width=48, blocks=4, seed=0,
                dtype=torch.float32, device="cpu"):
    """CycleGAN from unpaired images: returns two Generators, source -> target and target -> source.

    source, target: (N, C, H, W) arrays or tensors, sides even and at least 16. In each step, both ways
    (arXiv:1703.10593, eq. 3 with least squares):
        generators   min  (judge(fake) - 1)^2 + cycle |there and back - x|
        judges       min  (judge(real) - 1)^2 + judge(fake)^2
    Adam, the rate constant for half of the steps, then linear to 0; the weights are running means.
    """
    device = torch.device(device)
    channels = source.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generators = nn.ModuleList([Generator(channels, width, blocks) for _ in range(2)])
        judges = nn.ModuleList([judge(channels) for _ in range(2)])
    memory = torch.contiguous_format if device.type == "mps" else torch.channels_last
    rate = lambda step: min(1, 2 * (1 - step / steps))
    optimizers, schedules = [], []
    for module in (generators, judges):
        module.to(device=device, memory_format=memory)
        optimizers.append(torch.optim.Adam(module.parameters(), lr, betas=(0.5, 0.99)))
        schedules.append(torch.optim.lr_scheduler.LambdaLR(optimizers[-1], rate))
    (forth, back), (judge_source, judge_target) = generators, judges
    ema, apart = checkpoint.EMA(generators), F.l1_loss
    draw, start = torch.Generator().manual_seed(seed), time.time()
    for step in range(1, steps + 1):
        x, y = (pick(stack, batch_size, draw, device) for stack in (source, target))

        judges.requires_grad_(False)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            fake_y, fake_x = forth(x), back(y)
            fooled = off(judge_target(fake_y), 1) + off(judge_source(fake_x), 1)
            returned = apart(back(fake_y), x) + apart(forth(fake_x), y)
            loss = fooled + cycle * returned
        descend(loss, optimizers[0], schedules[0], clip=1.0)
        ema.update(step)

        judges.requires_grad_(True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            wrong = off(judge_target(y), 1) + off(judge_target(fake_y.detach()), 0)
            wrong = wrong + off(judge_source(x), 1) + off(judge_source(fake_x.detach()), 0)
        descend(wrong / 2, optimizers[1], schedules[1], clip=1.0)
        progress(step, steps, start, "CycleGAN", "steps")
    generators.load_state_dict(ema.mean)
    return forth.eval().requires_grad_(False), back.eval().requires_grad_(False)


def pick(stack, count, generator, device):
    """`count` images of a stack, drawn at random: (B, C, H, W) float32."""
    which = torch.randint(len(stack), (count,), generator=generator).numpy()
    return torch.as_tensor(stack[which]).to(device, torch.float32)


def descend(loss, optimizer, schedule, clip=math.inf):
    """One step of an optimizer. A gradient longer than `clip` is shortened to it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    schedule.step()


# ---------------------------------------------------------------- training with pairs

def regress(model, x, y):
    """The supervised translation x + model(x, t=1, y), y an int or (B,)."""
    y = torch.as_tensor(y, device=x.device).expand(len(x))
    return x + model(x, torch.ones(len(x), device=x.device), y).float()


def supervised(model, source, target, y_target, steps, batch_size=64, lr=1e-3, seed=0, dtype=torch.float32):
    """Train `model` in place on pairs, in one direction: a ceiling that sees what MedShift never sees.

        loss ||regress(model, x, y_target) - x1||^2        x, x1: source and target (N, C, H, W), same heads

    AdamW, cosine decay to zero. Returns the model.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    cosine = lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    model.train()
    draw, start = torch.Generator().manual_seed(seed), time.time()
    for step in range(1, steps + 1):
        which = torch.randint(len(source), (batch_size,), generator=draw).numpy()
        x, x1 = (torch.as_tensor(stack[which]).to(device, torch.float32) for stack in (source, target))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = (regress(model, x, y_target) - x1).square().mean()
        descend(loss, optimizer, schedule)
        progress(step, steps, start, "supervised", "steps")
    return model.eval()


def steps_within(seconds, train, trial=5):
    """How many steps of train(steps) take about `seconds`, at least 1: a rival gets as long as MedShift had.
    It is tried twice, so that what is done only once does not count."""
    train(trial)
    start = time.time()
    train(trial)
    return max(1, round(seconds * trial / (time.time() - start)))


# ---------------------------------------------------------------- files

def save(path, network, pair, y_target=None):
    """Write a translator: a Generator, or a supervised UNet with its label. pair: names of source, target."""
    if isinstance(network, Generator):
        how = dict(generator=network.config)
    else:
        how = dict(shape=vars(network.shape), y_target=y_target)
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    checkpoint.save(path, dict(pair=list(pair), weights=weights, **how))


def load(path, device="cpu"):
    """What `save` has written: a function from images (B, C, H, W) to translations, and the pair's names.
    Raises UserError if it is something else."""
    state = checkpoint.load(path, device)
    if "pair" not in state:
        raise UserError(f"{path} holds no rival: `python -m minimedshift.study rivals` trains them")
    direct = "generator" in state
    try:
        source, target = state["pair"]
        with torch.device("meta"):
            network = Generator(**state["generator"]) if direct else UNet(Shape(**state["shape"]))
    except Exception as error:  # a stranger's file can hold anything
        raise UserError(f"{path} holds a rival that cannot be read ({type(error).__name__})") from None
    check_weights(network, state.get("weights"), path)
    network = network.to_empty(device=device)
    network.load_state_dict(state["weights"])
    network.eval().requires_grad_(False)
    translate = network if direct else lambda x: regress(network, x, state["y_target"])
    return translate, (source, target)
