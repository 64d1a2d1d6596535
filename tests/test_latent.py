"""The probe and the neighbour on clouds whose answer is known, and the command on a tiny checkpoint."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from minimedshift import latent, phantom
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from minimedshift.model import Shape, UNet


def cloud(heads, domains, noise, N=40, D=4, F=200):
    """z = heads * (its own vector) + domains * (its domain's vector) + noise, each of unit variance."""
    draw = torch.Generator().manual_seed(0)
    person, domain, rest = (torch.randn(*shape, F, generator=draw) for shape in ((N, 1), (1, D), (N, D)))
    return (heads * person + domains * domain + noise * rest).double()


def test_a_shared_latent_hides_the_domain_and_keeps_the_head():
    shared = cloud(heads=1, domains=0, noise=0.1)
    assert latent.probe(shared) == pytest.approx(1 / 4, abs=0.12) and latent.same_head(shared) == 1


def test_a_latent_of_domains_and_one_that_has_forgotten_all_are_told_apart():
    apart, forgotten = cloud(heads=1, domains=1, noise=0.1), cloud(heads=0, domains=0, noise=1)
    assert latent.probe(apart) == 1
    assert latent.probe(forgotten) == pytest.approx(1 / 4, abs=0.12) and latent.same_head(forgotten) < 0.12


def test_domains_that_differ_in_the_power_of_their_noise_alone_are_told_apart():
    z = torch.randn(40, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    z[:, 1] *= 1.3
    assert latent.probe(z.flatten(2).double()) < 0.7 and latent.probe(latent.features(z)) > 0.95


def save_checkpoint(path, **config):
    model = UNet(Shape(stem=4, widths=(16,), blocks=(1,), head=16))
    config = dict(data=None, valid_heads=4, seed=0) | config
    how = dict(tau=0.4, guidance=1.0, steps=1, solver="euler", end=0.97, colour=1.0, x0="noise")
    image, weights = dict(size=16, channels=1, range=[-1.0, 1.0]), model.state_dict()
    domains = list(phantom.DOMAINS)
    checkpoint.save(path, dict(config=config, shape=asdict(model.shape), domains=domains, step=3, image=image,
                               translate=how, model=weights, ema=weights))
    return str(path)


def test_the_command_leaves_one_figure(tmp_path):
    net = save_checkpoint(tmp_path / "checkpoint.pt")
    env = {**os.environ, "MINIMEDSHIFT_CACHE": str(tmp_path / "cache")}
    line = [sys.executable, "-m", "minimedshift.latent", "--checkpoint", net]
    root = Path(latent.__file__).parents[1]
    done = subprocess.run(line, capture_output=True, env=env, cwd=root, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("domain told") == 11 and "tau 1.0" in done.stdout
    assert Image.open(tmp_path / "latent.png").width > 400


def test_what_has_no_latent_and_what_is_no_picture_is_told_before_any_work(tmp_path):
    net = save_checkpoint(tmp_path / "checkpoint.pt", data="photos")
    for flags, word in (([], "simulated"), (["--out", str(tmp_path / "a.txt")], ".png")):
        with pytest.raises(UserError, match=word):
            latent.main(["--checkpoint", net, *flags])
