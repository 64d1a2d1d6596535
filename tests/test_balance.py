"""A head is known again in every domain, weights undo a shift of population, images are drawn by them."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from minimedshift import balance
from minimedshift.data import Dataset
from minimedshift.phantom import sets


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return sets.paired_heads(64, 48, "valid", cache=tmp_path_factory.mktemp("cache"))


def test_a_head_is_known_again_in_another_domain(pairs):
    """The nearest neighbour of a head among the same heads in another domain is itself."""
    found = [balance.contrast_thumbnails(pairs.images[:, d]) for d in range(5)]
    for a, b in permutations(found, 2):
        assert (torch.cdist(a, b).argmin(1) == torch.arange(len(a))).float().mean() > .9


def blobs(x, seed):
    """Pictures (N, 1, 32, 32) of a dark spot whose place goes with x (N,) in [0, 1], and little noise."""
    g = np.random.default_rng(seed)
    at = torch.linspace(0, 1, 32)
    across = torch.exp(-((at[None] - .2 - .6 * torch.tensor(x)[:, None]) / .15) ** 2)[:, None, None, :]
    spot = across * torch.exp(-((at - .5) / .15) ** 2)[:, None]
    return (1 - spot.float() + .02 * torch.tensor(g.standard_normal(spot.shape)).float()).half().numpy()


@pytest.mark.parametrize("count", [3000, 400])
def test_weights_undo_a_known_shift(count):
    """Spots at x have density 1 in one domain and 2x in the other. Both become the harmonic mean
    2 / (1 + 1 / 2x), however many images the other has. (Of 400 a histogram is too rough.)"""
    g = np.random.default_rng(0)
    a, b = g.random(3000), np.sqrt(g.random(count))
    weights = balance.in_common([blobs(a, 1), .9 * blobs(b, 2) - .05])
    density = [np.histogram(x, 5, (0, 1), weights=w)[0] / w.sum() * 5 for x, w in zip((a, b), weights)]
    at = (np.arange(500) + .5) / 500
    wanted = (2 / (1 + 1 / (2 * at))).reshape(5, -1).mean(1)
    wanted /= wanted.mean()
    before = np.abs(np.histogram(b, 5, (0, 1), density=True)[0] - wanted).max()
    for found in density[:2 if count == 3000 else 1]:
        assert np.abs(found - wanted).max() < .15 < before


def test_one_population_is_left_nearly_alone():
    g = np.random.default_rng(0)
    weights = balance.in_common([blobs(g.random(1000), 1), blobs(g.random(1000), 2)])
    assert min(balance.effective(w) for w in weights) > 900


def test_images_are_drawn_by_their_weights():
    images = np.arange(4, dtype=np.float16).reshape(4, 1, 1, 1)
    weights = [np.array([0, 1, 1, 2], np.float32), np.ones(4, np.float32)]
    dataset = Dataset(("a", "b"), 1, 1, [images, images], [images[:0]] * 2, weights=weights)
    plain = replace(dataset, weights=None)
    for label, wanted in enumerate([[0, .25, .25, .5], [.25] * 4]):
        x1 = dataset.batch(torch.full((20000,), label), torch.Generator().manual_seed(0)).flatten().long()
        share = torch.bincount(x1, minlength=4) / len(x1)
        torch.testing.assert_close(share, torch.tensor(wanted), atol=.02, rtol=0)
    unweighted = plain.batch(torch.full((20000,), 1), torch.Generator().manual_seed(0))
    assert torch.equal(x1, unweighted.flatten().long())
    drawn = [some.flatten().tolist() for some in (dataset.drawn(0), dataset.drawn(1), plain.drawn(0))]
    assert drawn == [[1, 2, 3, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_domain_apart_is_warned_of(capsys, tmp_path):
    g = np.random.default_rng(0)
    left, right = blobs(.2 * g.random(600), 1), blobs(.8 + .2 * g.random(600), 2)
    few = blobs(.2 * g.random(12), 3)
    dataset = Dataset(("a", "b"), 32, 1, [left, np.concatenate([right, few])], [left[:0]] * 2)
    found = balance.balanced(dataset, tmp_path)
    said = capsys.readouterr().out
    assert "effective images: a " in said and "warning: b shows little" in said
    assert all(w.mean() == pytest.approx(1) for w in found.weights)
    assert found.weights[1][600:].mean() > 5 * found.weights[1][:600].mean()
    again = balance.balanced(dataset, tmp_path)  # from the cache
    assert all(np.array_equal(a, b) for a, b in zip(found.weights, again.weights))
