"""The simulated set holds what the simulator renders, in the same bytes every time; splits share no head."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minimedshift import phantom
from minimedshift.phantom import sets

SMALL = dict(size=16, train_images=10, valid_heads=2, test_heads=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return sets.phantom_set(**SMALL, cache=tmp_path_factory.mktemp("cache"))


def arrays(dataset):
    both = dataset.valid_pairs, dataset.test_pairs
    pairs = [getattr(pairs, kind) for pairs in both for kind in sets.KINDS]
    return [np.stack(dataset.train_images), dataset.test_pairs.decoys, *pairs]


def test_the_set_holds_what_the_simulator_renders(dataset):
    assert dataset.domains == tuple(phantom.DOMAINS) and dataset.channels == 1
    assert np.stack(dataset.train_images).shape == (5, 2, 1, 16, 16)
    assert dataset.test_pairs.images.shape == (3, 5, 1, 16, 16)
    for split, pairs in (("valid", dataset.valid_pairs), ("test", dataset.test_pairs)):
        head = phantom.Head(sets.first_seed(0, split) + 1)
        for d, domain in enumerate(phantom.DOMAINS):
            for kind, how in sets.KINDS.items():
                picture = phantom.render([head], domain, 16, **how)[0].half()
                torch.testing.assert_close(torch.tensor(getattr(pairs, kind)[1, d]), picture)
    for d, domain in enumerate(phantom.DOMAINS):
        seed = sets.first_seed(0, "train", d) + 1
        head = phantom.Head(seed, phantom.population(seed, domain, .1))
        picture = phantom.render([head], domain, 16)[0].half()
        torch.testing.assert_close(torch.tensor(dataset.train_images[d][1]), picture)


def test_decoys_are_other_people_in_the_same_view(dataset):
    seed = sets.first_seed(0, "test") + 1
    head, seen = phantom.Head(seed), set()
    for k in range(sets.DECOYS):
        other = phantom.Head(seed, anatomy=sets.first_seed(0, "test decoys") + sets.DECOYS + k)
        assert other.view == head.view and other.field == head.field
        assert not np.array_equal(other.matrix, head.matrix)
        picture = phantom.render([other], "real-low", 16, noise=False)[0].half()
        torch.testing.assert_close(torch.tensor(dataset.test_pairs.decoys[1, k, 2]), picture)
        seen.add(dataset.test_pairs.decoys[1, k, 2].tobytes())
    assert len(seen) == sets.DECOYS


def test_shift_is_the_share_of_heads_from_their_own_population():
    shifts = 0., .1, .55, 1.
    own = {shift: [phantom.population(seed, "real-low", shift) for seed in range(2000)] for shift in shifts}
    assert all(set(found) <= {None, "real-low"} for found in own.values())
    shares = {shift: np.mean([prior is not None for prior in found]) for shift, found in own.items()}
    assert shares[0.] == 0 and shares[1.] == 1
    assert shares[.1] == pytest.approx(.1, abs=.02) and shares[.55] == pytest.approx(.55, abs=.03)
    # more shift replaces heads, it does not draw all anew
    assert all(b for a, b in zip(own[.1], own[.55]) if a)


def test_the_bytes_do_not_depend_on_the_number_of_processes(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(sets.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(sets, "BIG", 0)
    monkeypatch.setattr(sets, "BLOCK", 2)  # two jobs for the test heads
    again = sets.phantom_set(**SMALL, cache=tmp_path)
    for a, b in zip(arrays(dataset), arrays(again)):
        np.testing.assert_array_equal(a, b)


def test_no_head_is_in_two_domains_or_two_splits(tmp_path, monkeypatch):
    seen, people = [], []

    class Fake:
        def __init__(self, seed, prior=None, anatomy=None):
            self.seed = seed
            (seen if anatomy is None else people).append(seed if anatomy is None else anatomy)

    monkeypatch.setattr(phantom, "Head", Fake)
    monkeypatch.setattr(phantom, "render", lambda heads, *_: torch.zeros(len(heads), 1, 8, 8))
    monkeypatch.setattr(phantom, "picture",
                        lambda materials, heads, *_, **__: torch.zeros(len(heads), 1, 8, 8))
    monkeypatch.setattr(phantom, "project", lambda heads, *_: torch.zeros(len(heads), 3, 8, 8))
    monkeypatch.setattr(sets, "BIG", 10**9)
    sets.phantom_set(8, 5 * 300, 70, 130, seed=3, cache=tmp_path)
    everyone = seen + people
    assert len(seen) == 5 * 300 + 70 + 130 and len(people) == 130 * sets.DECOYS
    first = [sets.first_seed(0, "train", d) for d in range(1, 20)]  # of more domains too
    assert not {*first} & {sets.first_seed(0, split) for split in sets.FIRST_SEED} and len({*first}) == 19
    assert len(everyone) == len(set(everyone))
    sets.phantom_set(8, 5 * 300, 70, 130, seed=4, cache=tmp_path)
    assert len(set(seen + people)) == 2 * len(everyone)


def test_the_cache_key_holds_everything_that_matters(monkeypatch):
    contents, source = [], sets.inspect.getsource
    monkeypatch.setattr(sets, "cached", lambda root, name, content, make: contents.append([name, content]))
    # without a folder in the cache there is nothing to return
    note = lambda function, **how: pytest.raises(AttributeError, function, **how)
    train, pairs = dict(size=16, per_domain=2), dict(size=16, count=2, split="valid")
    for change in ({}, dict(size=32), dict(per_domain=3), dict(seed=1), dict(shift=.55)):
        note(sets.training_images, **train | change)
    for change in {}, dict(size=32), dict(count=3), dict(split="test"), dict(seed=1), dict(prior="real-low"):
        note(sets.paired_heads, **pairs | change)
    for edited in (phantom.anatomy, phantom.rays, phantom.xray, sets):
        with monkeypatch.context() as m:
            m.setattr(sets.inspect, "getsource", lambda part: source(part) + "# edited" * (part is edited))
            note(sets.paired_heads, **pairs)
    monkeypatch.setattr(torch, "__version__", "9.9")
    note(sets.paired_heads, **pairs)
    assert len(contents) == len(set(map(json.dumps, contents))) == 16


def workers():
    """{process that renders: its parent}."""
    listed = subprocess.run(["ps", "-ewwo", "pid,ppid,args"], capture_output=True, text=True)
    return dict(map(int, line.split()[:2]) for line in listed.stdout.splitlines() if "spawn_main" in line)


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
@pytest.mark.slow
@pytest.mark.parametrize("event", ["a killed worker", "a killed parent", "Ctrl-C"])
def test_a_simulation_that_stops_half_way_leaves_no_process_and_one_sentence(tmp_path, event):
    code = ("from minimedshift.phantom import sets; from minimedshift.support.command import run\n"
            f"run(lambda: sets.training_images(64, 9999, cache={str(tmp_path)!r}))")
    env = os.environ | {"PYTHONPATH": str(Path(sets.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stderr=subprocess.PIPE,
                               start_new_session=True)
    mine = []
    while not mine and process.poll() is None:
        time.sleep(.2)
        mine = [worker for worker, parent in workers().items() if parent == process.pid]
    time.sleep(8)  # the workers begin
    mine = [worker for worker, parent in workers().items() if parent == process.pid]
    if event == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    elif event == "a killed parent":
        process.kill()
    else:  # killed when they hand over their blocks, for which the parent is too slow
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        for worker in mine:
            os.kill(worker, signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
    errors = process.communicate(timeout=60)[1]
    end = time.time() + 30
    while workers().keys() & mine and time.time() < end:
        time.sleep(.2)
    left = workers().keys() & mine
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert mine and not left
    if event != "a killed parent":
        status, word = (130, "interrupted") if event == "Ctrl-C" else (2, "was killed")
        assert process.returncode == status and word in errors and len(errors.split("\n")) <= 3, errors
        assert os.listdir(tmp_path) == []
