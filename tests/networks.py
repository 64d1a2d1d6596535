"""Checkpoints of untrained networks, for tests."""

from dataclasses import asdict

from minimedshift import phantom
from minimedshift.support import checkpoint

HOW = dict(tau=.4, guidance=1.0, steps=1, solver="euler", t_image=.97)


def save_network(path, net, size=32, domains=phantom.DOMAINS, translate=HOW, **more):
    """Write a checkpoint of `net`, which translates by `translate`; more: other parts of the state."""
    config = dict(data=None, train_images=100, valid_heads=4, test_heads=4, seed=0, shift=.1,
                  balance=False, coupling="independent", sigma=0.0, colour=1.0)
    state = dict(config=config, shape=asdict(net.shape), domains=list(domains), step=3, translate=translate,
                 image=dict(size=size, channels=net.shape.channels),
                 machine=dict(dtype="float32", memory_format="channels_last"),
                 model=net.state_dict(), ema=net.state_dict())
    checkpoint.save(path, state | more)
