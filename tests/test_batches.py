"""What a step is given: a function of seed and step, whatever the plan's window."""

from types import SimpleNamespace

import torch

from minimedshift.support.batches import draw, randomness


def test_labels_hidden_and_noise_come_from_two_streams():
    """On a CPU both generators are of one kind: seeded alike, the noise would tell which labels are hidden."""
    dataset = SimpleNamespace(domains=range(5), channels=1, size=16)
    config = SimpleNamespace(seed=0, batch_size=8, drop_label=.5, coupling="semidiscrete", times="uniform",
                             x0="noise", colour=0.)
    drawn = [draw(dataset, config, step, torch.device("cpu")) for step in range(300)]
    hidden = torch.stack([each[3] for each in drawn]).double()  # (300, 8)
    noise = torch.stack([each[0][0].flatten() for each in drawn]).double()  # (300, 256)
    table = torch.corrcoef(torch.cat([hidden, noise.abs(), noise], 1).T)[:8, 8:]
    assert table.abs().max() < .32  # 4096 coefficients of chance, each with a standard deviation of .058


def test_the_random_draws_of_a_step_depend_on_seed_and_step_alone():
    draw = lambda seed, step: torch.randn(3, generator=randomness(seed, step)).tolist()
    assert draw(0, 5) == draw(0, 5) and len({tuple(draw(s, k)) for s in range(3) for k in range(5)}) == 15
