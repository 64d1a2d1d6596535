"""What a step is given: a function of seed and step, whatever the plan's window, and made ahead without a change."""

import time

import torch

from minimedshift.batches import ahead, randomness


def test_the_random_draws_of_a_step_depend_on_seed_and_step_alone():
    draw = lambda seed, step: torch.randn(3, generator=randomness(seed, step)).tolist()
    assert draw(0, 5) == draw(0, 5) and len({tuple(draw(s, k)) for s in range(3) for k in range(5)}) == 15


def test_steps_drawn_ahead_are_the_same_and_come_before_they_are_asked_for():
    made = []

    def items():
        for k in range(5):
            made.append(k)
            yield torch.full((2,), k), "more"

    taken = []
    for k, item in enumerate(ahead(items(), torch.device("cpu"))):
        deadline = time.time() + 10
        while k < 4 and len(made) < k + 2 and time.time() < deadline:
            time.sleep(0.001)
        assert len(made) == min(5, k + 2)  # one ahead, and one only
        taken.append(item[0][0].item())
    assert taken == [0, 1, 2, 3, 4]
