"""The student against known answers: what it sees, what its loss makes of outliers, what its lessons are."""

from dataclasses import replace

import pytest
import torch

from minimedshift import finish, sampler, student
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from minimedshift.bands import Curve
from minimedshift.data import Dataset
from minimedshift.model import Shape as FlowShape
from minimedshift.model import UNet

SMALL = student.LocalShape(num_domains=3, width=16, dilations=(1,))


def awake(shape, seed=0):
    """A student whose last layers are not zero."""
    torch.manual_seed(seed)
    net = student.LocalNet(shape)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=.1)
    return net.requires_grad_(False)


def labels(*numbers):
    return torch.tensor(numbers)


@pytest.mark.parametrize("shape", [SMALL, student.LocalShape(width=8, dilations=(1, 3)),
                                   student.LocalShape(width=8, stem=4, dilations=(2,))])
def test_a_pixel_sees_as_far_as_view_says_and_no_farther(shape):
    net, side = awake(shape), 96
    x = torch.zeros(1, 1, side, side)
    there = x.clone()
    there[..., side // 2, side // 2] = 1
    moved = (net(there, labels(0), labels(1)) - net(x, labels(0), labels(1))).abs()[0, 0] > 0
    rows = moved.any(1).nonzero()[:, 0]
    reach = student.view(shape)
    allowed = range(reach, reach + shape.stem)
    assert side // 2 - rows.min() in allowed or rows.max() - side // 2 in allowed
    assert rows.max() - rows.min() == 2 * reach + shape.stem - 1


def test_the_student_hears_both_labels():
    net, x = awake(SMALL), torch.randn(1, 1, 8, 8)
    answers = [net(x, labels(s), labels(t)) for s in range(3) for t in range(3)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])


def test_an_untrained_student_changes_nothing():
    x = torch.randn(2, 1, 16, 24)
    assert torch.equal(student.LocalNet(SMALL)(x, labels(0, 1), labels(2, 0)), x)


@pytest.mark.parametrize("power, settles", [(1.0, .5), (2.0, .3)])
def test_the_loss_seeks_the_median_or_the_mean(power, settles):
    """The teacher answers .5 to eight of ten images that look alike and -.5 to the others."""
    images = torch.zeros(2, 10, 1, 8, 8)
    answers = torch.full((2, 2, 10, 1, 8, 8), .5)
    answers[:, :, 8:] = -.5
    net = student.learn(student.LocalShape(2, width=8, dilations=(1,)), images, answers, 300, lr=.01, power=power)
    assert net(images[0], labels(*[0] * 10), labels(*[1] * 10)).mean() == pytest.approx(settles, abs=.06)


def test_each_ordered_pair_has_its_own_answer():
    torch.manual_seed(0)
    images = torch.rand(2, 20, 1, 8, 8) - .5
    answers = torch.stack([torch.stack([images[0], -images[0]]), torch.stack([images[1] / 2 + .3, images[1]])])
    net = student.learn(student.LocalShape(2, width=16, dilations=(1,)), images, answers, 400, lr=.01)
    x = torch.rand(4, 1, 8, 8) - .5
    assert (net(x, labels(0, 0, 0, 0), labels(1, 1, 1, 1)) + x).abs().mean() < .05
    assert (net(x, labels(1, 1, 1, 1), labels(0, 0, 0, 0)) - x / 2 - .3).abs().mean() < .05


def test_the_students_weights_are_the_running_mean_of_those_it_had(monkeypatch):
    """With gamma = 1: the recursion of the mean, by hand, in float64."""
    seen = []

    class Spy(checkpoint.EMA):
        def update(self, step):
            super().update(step)
            seen.append((step, {name: p.detach().double() for name, p in self.live.items()}))

    monkeypatch.setattr(student.checkpoint, "EMA", Spy)
    monkeypatch.setattr(student, "AVERAGED", 1.0)
    images, answers = torch.zeros(2, 4, 1, 8, 8), torch.full((2, 2, 4, 1, 8, 8), .5)
    net = student.learn(student.LocalShape(2, width=8, dilations=(1,)), images, answers, 4, lr=.01)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    for name, p in net.named_parameters():
        mean = 0
        for step, live in seen:
            mean = mean + (live[name] - mean) * (1 - (1 - 1 / step) ** 2)
        torch.testing.assert_close(p.double(), mean, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(net.leave.bias.double(), seen[-1][1]["leave.bias"], atol=1e-5)


@pytest.mark.parametrize("x0", ["noise", "image"])
def test_lessons_are_the_teachers_translations(x0):
    torch.manual_seed(0)
    domains = 9 if x0 == "image" else 3  # from image to image a label stands for a pair
    teacher = UNet(FlowShape(num_domains=domains, stem=2, widths=(16,), blocks=(1,), head=16)).eval()
    for p in teacher.parameters():
        torch.nn.init.normal_(p, std=.3)
    images = torch.rand(3, 5, 1, 8, 8).half()
    how, told = dict(steps=2, solver="fireflow", end=.9, colour=1.0), []
    answers = student.lessons(teacher, images, .2, lambda *count: told.append(count), 2, x0, **how)
    for s, t in ((0, 1), (2, 1), (1, 0)):
        want = sampler.translate(teacher, images[s].float(), s, t, .2, x0=x0, **how)
        torch.testing.assert_close(answers[s, t].float(), want, atol=2e-3, rtol=2e-3)
        assert (want - images[s]).abs().mean() > .002
    assert told[-1] == (15, 15)


def test_images_are_turned_in_eight_ways():
    x = torch.arange(9.).view(1, 3, 3)
    assert len({tuple(student.turned(x, way).flatten().tolist()) for way in range(8)}) == 8


def test_images_are_spread_over_a_domain_by_weight():
    sets = [torch.arange(4.).view(4, 1, 1, 1).expand(4, 1, 8, 8).half().numpy()] * 2
    weights = [torch.tensor([1., 1., 1., 1.]).numpy(), torch.tensor([0., 2., 0., 2.]).numpy()]
    drawn = student.spread_out(Dataset(("a", "b"), 8, 1, sets, sets, weights=weights), 4)
    assert drawn[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3] and drawn[1, :, 0, 0, 0].tolist() == [1, 1, 3, 3]


def test_noise_belongs_to_the_image_whatever_stands_beside_it():
    x = torch.randn(3, 1, 8, 8)
    noise = student.fresh_noise(x, 1)
    assert torch.equal(student.fresh_noise(x[1:2], 1), noise[1:2])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(student.fresh_noise(x, 2), noise)
    assert student.fresh_noise(torch.zeros(1, 1, 99, 99)).std() == pytest.approx(1, abs=.03)


@pytest.fixture(scope="module")
def translator():
    torch.manual_seed(0)
    images = torch.rand(3, 8, 1, 16, 16) * 2 - 1
    net = awake(SMALL)
    finishes = finish.fit(net, images)
    own, wanted = ([Curve(-1.0, 1.0, torch.full((2,), size))] * 2 for size in (0.0, 0.1))
    # as if domain 1 had noise and the student left none
    finishes[0, 1] = replace(finishes[0, 1], own=own, wanted=wanted)
    return student.Student(net, finishes)


def test_a_batch_of_several_pairs_is_translated_pair_by_pair(translator):
    x, y_source, y_target = torch.rand(4, 1, 16, 16), labels(0, 1, 0, 2), labels(1, 2, 1, 2)
    together = translator(x, y_source, y_target, seed=3)
    for i in range(4):
        alone = translator(x[i:i + 1], int(y_source[i]), int(y_target[i]), seed=3)
        torch.testing.assert_close(together[i:i + 1], alone, atol=1e-5, rtol=1e-5)
    own = translator.student(x, labels(0, 0, 0, 0), labels(1, 1, 1, 1))
    assert torch.equal(translator(x, 0, 1, finished=False), own)
    assert not torch.equal(translator(x, 0, 1, seed=1), translator(x, 0, 1, seed=2))


def test_an_image_that_is_in_the_target_domain_stays_as_it_is(translator):
    x = torch.rand(2, 1, 16, 16)
    out = translator(x, labels(1, 0), labels(1, 1))
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])


def test_a_translator_goes_through_a_checkpoint(translator, tmp_path):
    checkpoint.save(tmp_path / "net.pt", dict(student=translator.state()))
    state = checkpoint.load(tmp_path / "net.pt")["student"]
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(student.restore(state)(x, 2, 0), translator(x, 2, 0))
    deep = dict(state["shape"], depth=1)
    for broken in (dict(state, finishes=None), dict(shape=state["shape"]), dict(state, shape=deep)):
        with pytest.raises(UserError, match="net.pt holds a student that cannot be read"):
            student.restore(broken, path="net.pt")
    state["shape"]["width"] = 24
    with pytest.raises(UserError, match="net.pt holds another network: blocks.0"):
        student.restore(state, path="net.pt")


def test_the_whole_lesson_is_the_same_twice():
    torch.manual_seed(0)
    sets = [(torch.rand(6, 1, 16, 16) * 2 - 1).half().numpy() for _ in range(2)]
    dataset = Dataset(("a", "b"), 16, 1, sets, sets)
    teacher = UNet(FlowShape(num_domains=2, stem=2, widths=(16,), blocks=(1,), head=16)).eval()
    how = dict(steps=1, solver="fireflow", end=.99, colour=1.0, x0="noise")
    make = lambda: student.teach(teacher, dataset, 4, 3, .1, how, torch.float32, torch.device("cpu"))
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(make()(x, 0, 1), make()(x, 0, 1))
