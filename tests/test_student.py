"""The student against known answers: what it sees, what its loss makes of outliers, what its lessons are."""

import itertools
from dataclasses import replace

import pytest
import torch

from minimedshift import finish, sampler, student
from minimedshift.bands import Curve
from minimedshift.data import Dataset
from minimedshift.model import Shape as FlowShape
from minimedshift.model import UNet
from minimedshift.sizes import resize
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from test_finish import distances

SMALL = student.LocalShape(num_domains=3, width=16, blocks=1)


def awake(shape, seed=0):
    """A network whose last layers are not zero."""
    torch.manual_seed(seed)
    net = student.LocalNet(shape)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=.1)
    return net.requires_grad_(False)


def flow(domains):
    return UNet(FlowShape(num_domains=domains, stem=2, widths=(16,), blocks=(1,), head_width=16)).eval()


def labels(*numbers):
    return torch.tensor(numbers)


# ---------------------------------------------------------------- the network
@pytest.mark.parametrize("shape", [SMALL, student.LocalShape(width=8, blocks=2),
                                   student.LocalShape(width=8, stem=2, blocks=1)])
def test_a_pixel_sees_as_far_as_the_convolutions_and_no_farther(shape):
    net, side = awake(shape), 96
    x = torch.zeros(1, 1, side, side)
    point = x.clone()
    point[..., side // 2, side // 2] = 1
    moved = (net(point, labels(0), labels(1)) - net(x, labels(0), labels(1))).abs()[0, 0] > 0
    rows = moved.any(1).nonzero()[:, 0]
    reach = shape.stem * (2 + 2 * shape.blocks)  # two convolutions a block, one at each end
    allowed = range(reach, reach + shape.stem)
    assert side // 2 - rows.min() in allowed or rows.max() - side // 2 in allowed
    assert rows.max() - rows.min() == 2 * reach + shape.stem - 1


def test_an_untrained_student_changes_nothing():
    x = torch.randn(2, 1, 16, 24)
    for shrink in 1, 2, 3:  # 16 and 24 are no multiples of 3 x 4
        net = student.LocalNet(replace(SMALL, shrink=shrink))
        assert torch.equal(net(x, labels(0, 1), labels(2, 0)), x)


def test_it_changes_a_large_image_as_a_small_copy():
    net = awake(SMALL)
    large = student.LocalNet(replace(SMALL, shrink=2)).requires_grad_(False)
    large.load_state_dict(net.state_dict())
    x, pair = torch.randn(2, 1, 32, 48), (labels(0, 1), labels(2, 0))
    change = large(x, *pair) - x
    small = resize(x, (16, 24))
    torch.testing.assert_close(change, resize(net(small, *pair) - small, (32, 48)), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- lessons
other = lambda n: torch.tensor([1, 0])[:, None].expand(2, n)  # targets of n images of two domains


def test_the_loss_seeks_the_median():
    """The flow answers .5 to eight of ten images that look alike and -.5 to the others: the mean is .3."""
    images = torch.zeros(2, 10, 1, 8, 8)
    answers = torch.full((2, 10, 1, 8, 8), .5)
    answers[:, 8:] = -.5
    shape = student.LocalShape(2, width=8, blocks=1)
    net = student.learn(shape, images, other(10), answers, 300, forth=32, lr=.01)
    assert net(images[0], labels(*[0] * 10), labels(*[1] * 10)).mean() == pytest.approx(.5, abs=.06)


@pytest.mark.parametrize("forth", [32, 0])
def test_each_ordered_pair_has_its_own_answer_forth_and_back(forth):
    torch.manual_seed(0)
    images = torch.rand(2, 20, 1, 8, 8) - .5
    answers = torch.stack([-images[0], images[1] / 2 + .3])
    a, b = (images, answers) if forth else (answers.flip(0), images.flip(0))  # to be read backwards
    net = student.learn(student.LocalShape(2, 1, 16, 2, 1), a, other(20), b, 400, forth=forth, lr=.1)
    x = torch.rand(4, 1, 8, 8) - .5
    assert (net(x, labels(0, 0, 0, 0), labels(1, 1, 1, 1)) + x).abs().mean() < .05
    assert (net(x, labels(1, 1, 1, 1), labels(0, 0, 0, 0)) - x / 2 - .3).abs().mean() < .05


def test_lessons_are_the_flows_translations():
    torch.manual_seed(0)
    model = flow(3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.3)
    images = torch.rand(3, 5, 1, 8, 8).half()
    how = dict(tau=.2, guidance=1.5, steps=2, solver="fireflow", t_image=.9)
    targets, answers = student.lessons(model, images, batch=2, **how)
    assert targets.shape == (3, 5) and len(targets.unique()) == 3
    for s, i in itertools.product(range(3), range(5)):
        t, x = targets[s, i], images[s, i, None].float()
        want = sampler.translate(model, x, s, int(t), **how)
        torch.testing.assert_close(answers[s, i, None].float(), want, atol=2e-3, rtol=2e-3)
        assert t != s and (want - x).abs().mean() > .002


def test_bands_teach_where_they_change_little():
    """.02 of a contrast of about .1 is little, .3 is not. They do the more of it, the more certain it is: of
    20 and 5 images less than of SOME and more."""
    a = torch.rand(1, 60, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - .5
    images = torch.cat([a, a + .02, a - .3]).half()
    found = finish.measure(images, [20, 5, 1000])
    assert found.log and found.certain[2, 2] == 0
    off = torch.tensor([[0, .02, .3], [.02, 0, .32], [.3, .32, 0]])
    torch.testing.assert_close(found.changes, off, atol=.002, rtol=.02)
    bands = student.bands_between(images, found)
    assert set(bands) == {(0, 1), (1, 0)}
    x = images[0].float()
    certain = .02**2 / (.02**2 + .007**2 * (250 / 20 + 250 / 5) / 2)
    assert (bands[0, 1](x) - x - .02 * certain).abs().mean() < .002
    targets, answers = student.lessons(flow(3), images, bands, steps=1)
    mine = targets[0] == 1
    torch.testing.assert_close(answers[0, mine].float(), bands[0, 1](x[mine]), atol=1e-3, rtol=0)
    torch.testing.assert_close(answers[0, ~mine].float(), x[~mine])  # the flow's, that is not trained


def test_images_are_turned_in_eight_ways():
    x = torch.arange(9.).view(1, 3, 3)
    assert len({tuple(student.turned(x, way).flatten().tolist()) for way in range(8)}) == 8


def test_images_are_spread_over_a_domain_by_weight():
    sets = [torch.arange(4.).view(4, 1, 1, 1).expand(4, 1, 8, 8).half().numpy()] * 2
    weights = [torch.tensor([1., 1., 1., 1.]).numpy(), torch.tensor([0., 2., 0., 2.]).numpy()]
    drawn = student.spread_out(Dataset(("a", "b"), 8, 1, sets, sets, weights=weights), 4)
    assert drawn[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3] and drawn[1, :, 0, 0, 0].tolist() == [1, 1, 3, 3]


# ---------------------------------------------------------------- the network and its finish
@pytest.fixture(scope="module")
def made():
    """A Student whose target 1 has noise, as if its network left none."""
    torch.manual_seed(0)
    net = awake(SMALL)
    finishes = finish.fit(net, torch.rand(3, 8, 1, 16, 16) * 2 - 1, distances(3))
    own, wanted = ([Curve(-1.0, 1.0, torch.full((2,), size))] * 2 for size in (0.0, 0.1))
    finishes[0, 1] = replace(finishes[0, 1], own=own, wanted=wanted)
    return student.Student(net, finishes)


def test_a_batch_of_several_pairs_is_translated_pair_by_pair(made):
    """The last pair is none: an image that is in the target domain stays as it is."""
    x, y_source, y_target = torch.rand(4, 1, 16, 16), labels(0, 1, 0, 2), labels(1, 2, 1, 2)
    together = made(x, y_source, y_target, seed=3)
    for i in range(4):
        alone = made(x[i:i + 1], int(y_source[i]), int(y_target[i]), seed=3)
        torch.testing.assert_close(together[i:i + 1], alone, atol=1e-4, rtol=1e-5)  # a curve can be steep
    assert torch.equal(together[3], x[3]) and not torch.equal(together[2], x[2])
    own = made.net(x, labels(0, 0, 0, 0), labels(1, 1, 1, 1))
    assert torch.equal(made(x, 0, 1, finished=False), own)
    assert not torch.equal(made(x, 0, 1, seed=1), made(x, 0, 1, seed=2))


def test_a_student_goes_through_a_checkpoint(made, tmp_path):
    checkpoint.save(tmp_path / "net.pt", dict(student=made.state()))
    state = checkpoint.load(tmp_path / "net.pt")["student"]
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(student.restore(state)(x, 2, 0), made(x, 2, 0))
    deep = dict(state["shape"], depth=1)
    for broken in (dict(state, finishes=None), dict(shape=state["shape"]), dict(state, shape=deep)):
        with pytest.raises(UserError, match="net.pt holds a student that cannot be read"):
            student.restore(broken, path="net.pt")
    state["shape"]["width"] = 24
    with pytest.raises(UserError, match="net.pt holds another network: blocks.0"):
        student.restore(state, path="net.pt")


def test_what_a_student_learns_is_the_same_twice():
    torch.manual_seed(0)
    sets = [(torch.rand(6, 1, 16, 16) * 2 - 1).half().numpy() for _ in range(2)]
    dataset, model = Dataset(("a", "b"), 16, 1, sets, sets), flow(2)
    make = lambda: student.teach(model, dataset, 4, 3, torch.float32, torch.device("cpu"))
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(make()(x, 0, 1), make()(x, 0, 1))


def test_the_rate_is_that_of_one_cycle():
    for steps in (7, 100):
        one = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(one, 1.0, steps)
        for step in range(1, steps + 1):
            assert student.one_cycle(step, steps) == pytest.approx(one.param_groups[0]["lr"], abs=1e-5)
            one.step()
            if step < steps:
                schedule.step()
