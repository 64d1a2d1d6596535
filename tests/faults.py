"""Does a test notice? Deliberate faults of one line, each put into a copy of the code and tested there.

    python tests/faults.py              all of them: some minutes
    python tests/faults.py NAME ...     these

Each is a mistake that is easily made: a sign, a factor 2, sigma for sigma^2, a label that nobody reads. Ends
with status 1 if the tests pass with a fault in the code. Add one where you add a formula.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PARTS = ("minimedshift", "tests", "train.py", "translate.py", "pytest.ini")


class Fault(NamedTuple):
    """One line of `file` and what it becomes, without indentation; tests: arguments of pytest that see it."""
    file: str
    tests: str
    old: str
    new: str


FAULTS = {
    # ---- flow.py: the bridge and its loss
    "bridge-spread": Fault(
        "minimedshift/flow.py", "tests/test_flow.py",
        "spread = (t * (1 - t)).sqrt()",
        "spread = t * (1 - t)"),
    "bridge-sigma-squared": Fault(
        "minimedshift/flow.py", "tests/test_flow.py",
        "xt = xt + sigma * spread * e",
        "xt = xt + sigma**2 * spread * e"),
    "bridge-slope-without-2": Fault(
        "minimedshift/flow.py", "tests/test_flow.py",
        "ut = ut + sigma * (1 - 2 * t) / (2 * spread) * e",
        "ut = ut + sigma * (1 - 2 * t) / spread * e"),
    "weight-sigma": Fault(
        "minimedshift/flow.py", "tests/test_flow.py",
        "return 1 / (1 + sigma**2 * (1 - 2 * t) ** 2 / (4 * t * (1 - t)))",
        "return 1 / (1 + sigma * (1 - 2 * t) ** 2 / (4 * t * (1 - t)))"),
    "loss-not-weighted": Fault(
        "minimedshift/flow.py", "tests/test_flow.py",
        "return weight(t, sigma) * mean_square(out - ut)",
        "return mean_square(out - ut)"),
    "loss-of-the-whole-velocity": Fault(
        "minimedshift/flow.py", "tests/test_flow.py",
        "return mean_square(d - (x1 - x0)) + mean_square(n - e)",
        "return mean_square(d - ut) + mean_square(n - e)"),
    "tint-amplitude": Fault(
        "minimedshift/flow.py", "tests/test_flow.py",
        "gain = gain / gain.square().mean().sqrt()",
        "gain = gain / gain.mean()"),
    "velocity-sign-of-the-score": Fault(
        "minimedshift/flow.py", "tests/test_flow.py",
        "return d - (1 - 2 * t) * s, s",
        "return d + (1 - 2 * t) * s, s"),
    "pair-turned": Fault(
        "minimedshift/flow.py", "tests/test_sampler.py -k image_to_image",
        "return y_source * num_domains + y_target",
        "return y_target * num_domains + y_source"),
    # ---- coupling.py and batches.py: which noise with which image
    "cost-without-2": Fault(
        "minimedshift/coupling.py", "tests/test_coupling.py",
        "return (2 * centred(x1) @ centred(x0).T).masked_fill(y[:, None] != y, -torch.inf)",
        "return (centred(x1) @ centred(x0).T).masked_fill(y[:, None] != y, -torch.inf)"),
    "cost-blind-to-labels": Fault(
        "minimedshift/coupling.py", "tests/test_coupling.py",
        "return (2 * centred(x1) @ centred(x0).T).masked_fill(y[:, None] != y, -torch.inf)",
        "return 2 * centred(x1) @ centred(x0).T"),
    "cost-turned": Fault(
        "minimedshift/coupling.py", "tests/test_coupling.py",
        "return (2 * centred(x1) @ centred(x0).T).masked_fill(y[:, None] != y, -torch.inf)",
        "return (2 * centred(x0) @ centred(x1).T).masked_fill(y[:, None] != y, -torch.inf)"),
    "sinkhorn-rows-twice": Fault(
        "minimedshift/coupling.py", "tests/test_coupling.py",
        "turned = matrix.T.contiguous()",
        "turned = matrix.contiguous()"),
    "gumbel-sign": Fault(
        "minimedshift/coupling.py", "tests/test_coupling.py",
        "index = (logits - e.log()).argmax(1)  # a draw, by the Gumbel-max trick: -log e is Gumbel noise",
        "index = (logits + e.log()).argmax(1)"),
    "assignment-inverse": Fault(
        "minimedshift/coupling.py", "tests/test_coupling.py",
        "index[mine] = mine[assign(-centred(x1[rows]) @ centred(x0[rows]).T)]",
        "index[mine] = mine[assign(-centred(x0[rows]) @ centred(x1[rows]).T)]"),
    "potentials-descend": Fault(
        "minimedshift/coupling.py", "tests/test_coupling.py",
        "g = g + rate * (weight - share)",
        "g = g - rate * (weight - share)"),
    "cost-of-all-pairs": Fault(
        "minimedshift/coupling.py", "tests/test_coupling.py",
        "all_pairs = squares - 2 * (a * mean[y]).sum(1).mean()",
        "all_pairs = squares - (a * mean[y]).sum(1).mean()"),
    "batch-eps": Fault(
        "minimedshift/batches.py", "tests/test_batches.py",
        "eps = 2 * config.sigma**2",
        "eps = config.sigma**2"),
    "batch-without-its-plan": Fault(
        "minimedshift/batches.py", "tests/test_batches.py",
        "x0, x1, y, hidden, t, e = own(x0[plan.index], x1, y, hidden, t, e)",
        "x0, x1, y, hidden, t, e = own(x0, x1, y, hidden, t, e)"),
    "batch-hides-no-label": Fault(
        "minimedshift/batches.py", "tests/test_batches.py",
        "y = to_device(y, device).masked_fill(to_device(hidden, device), null_label(config, domains))",
        "y = to_device(y, device)"),
    "batch-pair-turned": Fault(
        "minimedshift/batches.py", "tests/test_batches.py",
        "y = direct_label(source, y, domains)",
        "y = direct_label(y, source, domains)"),
    "potentials-of-white-noise": Fault(
        "minimedshift/batches.py", "tests/test_batches.py",
        "tinted = tint(torch.from_numpy(np.array(images, np.float32)), config.colour)",
        "tinted = torch.from_numpy(np.array(images, np.float32))"),
    "batch-window-from-the-resumed-step": Fault(
        "minimedshift/batches.py", "tests/test_batches.py",
        "for start in range(first - first % n, config.steps, n):",
        "for start in range(first, config.steps, n):"),
    # ---- sampler.py: the ways back and forward
    "guidance-from-the-label": Fault(
        "minimedshift/sampler.py", "tests/test_sampler.py -k guid",
        "return null + self.guidance * (out - null)",
        "return out + self.guidance * (out - null)"),
    "guidance-on-the-way-back": Fault(
        "minimedshift/sampler.py", "tests/test_sampler.py -k guid",
        "*down, (_, z) = solve(Velocity(model, y_source, 1.0, colour, generator), x1, times)",
        "*down, (_, z) = solve(Velocity(model, y_source, guidance, colour, generator), x1, times)"),
    "decode-with-the-source": Fault(
        "minimedshift/sampler.py", "tests/test_sampler.py -k between_gaussians",
        "yield from solve(Velocity(model, y_target, guidance, colour, generator), z, times[::-1])",
        "yield from solve(Velocity(model, y_source, guidance, colour, generator), z, times[::-1])"),
    "heun-at-the-old-time": Fault(
        "minimedshift/sampler.py", "tests/test_sampler.py -k both_directions",
        "x = x + h / 2 * (slope + v(x + h * slope, after))",
        "x = x + h / 2 * (slope + v(x + h * slope, t))"),
    "fireflow-at-the-end": Fault(
        "minimedshift/sampler.py", "tests/test_sampler.py -k both_directions",
        "midpoint = v(x + h / 2 * midpoint, t + h / 2)",
        "midpoint = v(x + h * midpoint, t + h)"),
    "sde-backward-drift": Fault(
        "minimedshift/sampler.py", 'tests/test_sampler.py -k "marginals and 1-0.5"',
        "x = x + (after - t) * vt + h * st + v.width(t) * math.sqrt(h * r) * v.noise(x)",
        "x = x + (after - t) * (vt + st) + v.width(t) * math.sqrt(h * r) * v.noise(x)"),
    "sde-last-step": Fault(
        "minimedshift/sampler.py", "tests/test_sampler.py -k two_known_images",
        "h, r = abs(after - t), (1 - after) / (1 - t) if after > t else after / t",
        "h, r = abs(after - t), 1.0"),
    "sde-width-without-2": Fault(
        "minimedshift/sampler.py", "tests/test_sampler.py -k without_a_score_head",
        "return self.sigma or math.sqrt(2 * (1 - t))",
        "return self.sigma or math.sqrt(1 - t)"),
    "sde-sign-of-the-score": Fault(
        "minimedshift/sampler.py", "tests/test_sampler.py -k without_a_score_head",
        "return velocity_and_score(out, t, self.sigma) if self.sigma else (out, t * out - x)",
        "return velocity_and_score(out, t, self.sigma) if self.sigma else (out, x - t * out)"),
    # ---- metrics.py
    "noise-against-the-truth": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        "return detail - a[:, None, None, None] * known, fine(images - truth).double() * mask",
        "return detail - a[:, None, None, None] * known, fine(images).double() * mask"),
    "noise-ratio-turned": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        '"noise": lambda x, truth, images: noise_ratio(x, images, truth),',
        '"noise": lambda x, truth, images: noise_ratio(images, x, truth),'),
    "gap-anchors-turned": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        "return None if E_curve <= E_second else (E_curve - E) / (E_curve - E_second)",
        "return None if E_curve <= E_second else (E - E_second) / (E_curve - E_second)"),
    "data-range-of-1": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        "return 10 * torch.log10(4 / error)",
        "return 10 * torch.log10(1 / error)"),
    "same-head-as-any": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        "return (E[:, None] < E_others).all(1)",
        "return (E[:, None] < E_others).any(1)"),
    "false-structure-at-the-full-threshold": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        "false += (of_x & region & ~near(sign * there > threshold / 2)).sum().item()",
        "false += (of_x & region & ~near(sign * there > threshold)).sum().item()"),
    "interval-of-90-percent": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        "low, high = values.quantile(values.new_tensor([.025, .975]), dim=-1)",
        "low, high = values.quantile(values.new_tensor([.05, .95]), dim=-1)"),
    "difference-turned": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        "share = lambda a, b, curve, second: (b - a).mean(-1) / (curve - second).mean(-1)",
        "share = lambda a, b, curve, second: (a - b).mean(-1) / (curve - second).mean(-1)"),
    "attenuation-turned": Fault(
        "minimedshift/metrics.py", "tests/test_metrics.py",
        "bone, soft = (own / right if abs(right) > 1e-6 else None for own, right in pairs)",
        "bone, soft = (right / own if abs(right) > 1e-6 else None for own, right in pairs)"),
    # ---- student.py
    "student-blind-to-the-source": Fault(
        "minimedshift/student.py", "tests/test_student.py",
        "emb = self.pair(y_source * self.shape.num_domains + y_target)",
        "emb = self.pair(y_target)"),
    "answers-turned": Fault(
        "minimedshift/student.py", "tests/test_student.py",
        "x, answer = (turned(z, way).to(device, torch.float32) for z in (images[s, i], answers[s, t, i]))",
        "x, answer = (turned(z, way).to(device, torch.float32) for z in (images[s, i], answers[t, s, i]))"),
    "student-without-ema": Fault(
        "minimedshift/student.py", "tests/test_student.py",
        "student.load_state_dict(ema.mean)",
        "student.load_state_dict(ema.live)"),
    "loss-squared": Fault(
        "minimedshift/student.py", "tests/test_student.py",
        "loss = ((out - answer).abs() + 1e-6).pow(power).mean()",
        "loss = (out - answer).square().mean()"),
    "lessons-encoded-with-the-target": Fault(
        "minimedshift/student.py", "tests/test_student.py",
        "decode = lambda t: sampler.decode(model, z, t, tau, **how)",
        "decode = lambda t: sampler.decode(model, z, s, tau, **how)"),
    "finish-of-the-way-back": Fault(
        "minimedshift/student.py", "tests/test_student.py",
        "mine = (y_source == s) & (y_target == t)",
        "mine = (y_source == t) & (y_target == s)"),
    # ---- finish.py and bands.py
    "tone-of-the-source": Fault(
        "minimedshift/finish.py", "tests/test_finish.py",
        "pixels = fit_histogram(x, target)",
        "pixels = fit_histogram(x, images[s].float())"),
    "grain-before-the-tone": Fault(
        "minimedshift/finish.py", "tests/test_finish.py",
        "own = grain(pixels(x[some]), robust=False)",
        "own = grain(x[some], robust=False)"),
    "deviations-subtracted": Fault(
        "minimedshift/finish.py", "tests/test_finish.py",
        "parts.append(gain * band + (w**2 - o**2).clamp(min=0).sqrt() * e / deviation)",
        "parts.append(gain * band + (w - o).clamp(min=0) * e / deviation)"),
    "gain-of-a-power": Fault(
        "minimedshift/finish.py", "tests/test_finish.py",
        "gain = (1 - (o**2 - w**2).clamp(min=0) / power).clamp(min=0).sqrt()",
        "gain = (1 - (o**2 - w**2).clamp(min=0) / power).clamp(min=0)"),
    "gauss-width": Fault(
        "minimedshift/bands.py", "tests/test_bands.py",
        "return torch.softmax(-((i[:, None] - i[None]) ** 2) / (2 * width**2), 1)",
        "return torch.softmax(-((i[:, None] - i[None]) ** 2) / (2 * width), 1)"),
    "histogram-turned": Fault(
        "minimedshift/bands.py", "tests/test_bands.py",
        "curves = [fit_histogram(s, t) for s, t in zip(split(source), split(target))]",
        "curves = [fit_histogram(t, s) for s, t in zip(split(source), split(target))]"),
    "pyramid-aliases": Fault(
        "minimedshift/bands.py", "tests/test_bands.py",
        'small = F.interpolate(x, half, mode="bilinear", antialias=True)',
        'small = F.interpolate(x, half, mode="bilinear")'),
    # ---- balance.py
    "arithmetic-mean": Fault(
        "minimedshift/balance.py", "tests/test_balance.py -k weights",
        "w = 1 / (1 / n).mean(1) / n[:, own]",
        "w = n.mean(1) / n[:, own]"),
    "counts-for-shares": Fault(
        "minimedshift/balance.py", "tests/test_balance.py -k weights",
        "n = (counts + k / 400) / size.double()  # (N, D); a little more than counted, so that none is 0",
        "n = (counts + k / 400).double()"),
    # ---- checkpoint.py, guard.py, optim.py and train.py
    "ema-off-by-one": Fault(
        "minimedshift/support/checkpoint.py", "tests/test_checkpoint.py",
        "keep = (1 - 1 / step) ** (self.gamma + 1)",
        "keep = (1 - 1 / (step + 1)) ** (self.gamma + 1)"),
    "ema-exponent": Fault(
        "minimedshift/support/checkpoint.py", "tests/test_checkpoint.py",
        "keep = (1 - 1 / step) ** (self.gamma + 1)",
        "keep = (1 - 1 / step) ** self.gamma"),
    "load-the-raw-weights": Fault(
        "minimedshift/support/checkpoint.py", "tests/test_checkpoint.py",
        'model.load_state_dict(state["ema"])',
        'model.load_state_dict(state["model"])'),
    "resume-skips-a-step": Fault(
        "train.py", "tests/test_train.py -k going_on",
        'return before["step"], before.get("student") if same_lessons else None',
        'return before["step"] + 1, before.get("student") if same_lessons else None'),
    "resume-without-the-optimizer": Fault(
        "train.py", "tests/test_train.py -k going_on",
        "optimizer.load_state_dict(state)",
        "optimizer.zero_grad()"),
    "resume-with-the-raw-weights-as-mean": Fault(
        "train.py", "tests/test_train.py -k going_on",
        'ema.load(before["ema"])',
        'ema.load(before["model"])'),
    "guard-lets-nan-pass": Fault(
        "minimedshift/support/guard.py", "tests/test_guard.py -k kept_state",
        "if not (loss < self.limit and math.isfinite(norm)):",
        "if loss >= self.limit or not math.isfinite(norm):"),
    "guard-keeps-a-view": Fault(
        "minimedshift/support/guard.py", "tests/test_guard.py -k kept_state",
        "self.weights = {name: p.detach().clone() for name, p in self.model.state_dict().items()}",
        "self.weights = {name: p.detach() for name, p in self.model.state_dict().items()}"),
    "guard-gives-its-moments-away": Fault(
        "minimedshift/support/guard.py", "tests/test_guard.py -k kept_state",
        "optimizer.load_state_dict(copy.deepcopy(moments))",
        "optimizer.load_state_dict(moments)"),
    "muon-momentum": Fault(
        "minimedshift/optim.py", "tests/test_checkpoint.py",
        'torch._foreach_lerp_(means, grads, 1 - group["momentum"])',
        'torch._foreach_lerp_(means, grads, group["momentum"])'),
    "muon-without-nesterov": Fault(
        "minimedshift/optim.py", "tests/test_checkpoint.py",
        'ahead = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov',
        "ahead = means"),
    "muon-scale": Fault(
        "minimedshift/optim.py", "tests/test_checkpoint.py",
        "scale = max(1, p.shape[0] / p[0].numel()) ** 0.5",
        "scale = max(1, p.shape[0] / p.shape[1]) ** 0.5"),
    "muon-takes-the-last-layer": Fault(
        "minimedshift/optim.py", "tests/test_checkpoint.py",
        'ends = ("stem.", "out.")',
        'ends = ("stem.",)'),
    # ---- model.py
    "label-on-the-way-down": Fault(
        "minimedshift/model.py", "tests/test_model.py",
        "x = block(x, emb_down)",
        "x = block(x, emb_up)"),
    "frequencies-half-as-far": Fault(
        "minimedshift/model.py", "tests/test_model.py",
        "w = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(1e4) / (dim // 2)))",
        "w = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(1e4) / dim))"),
    "attention-heads-mixed": Fault(
        "minimedshift/model.py", "tests/test_model.py",
        "return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))",
        "return x + self.out(h.reshape(B, C, H, W))"),
    "film-ignored": Fault(
        "minimedshift/model.py", "tests/test_model.py",
        "h = self.conv1(act(self.norm1, x, scale, shift))",
        "h = self.conv1(act(self.norm1, x))"),
}


def stale(name):
    """What is wrong with an entry of the list, or None."""
    file, _, old, new = FAULTS[name]
    found = sum(line.strip() == old for line in (ROOT / file).read_text().splitlines())
    if found != 1:
        return f"the list is stale: {file} has {found} lines that read: {old}"
    return "the fault changes nothing" if old == new else None


def copied(folder):
    """The code and its tests, copied to a folder."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)


def put(folder, name):
    """Put a fault into the copy of the code in a folder."""
    file, _, old, new = FAULTS[name]
    lines = (folder / file).read_text().splitlines(keepends=True)
    changed = (line.replace(old, new) if line.strip() == old else line for line in lines)
    (folder / file).write_text("".join(changed))


def tested(tests, name=None):
    """pytest's exit status on a fresh copy of the code, with a fault if one is named, and what it says."""
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        if name:
            put(Path(folder), name)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
        env = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def main(names):
    """Try the faults of these names, or all; 1 if one is not caught, else 0."""
    if unknown := [name for name in names if name not in FAULTS]:
        sys.exit(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    names = names or list(FAULTS)
    if wrong := [f"{name}: {says}" for name in names if (says := stale(name))]:
        sys.exit("\n".join(wrong))
    start, missed = time.time(), []
    asked = {FAULTS[name].tests for name in names}
    whole = {tests for tests in asked if "-k" not in tests}  # files that one run can take together
    for tests in [" ".join(sorted(whole))] * bool(whole) + sorted(asked - whole):
        status, says = tested(tests)
        if status:
            sys.exit(f"{tests} fails without any fault:\n{says}")
    for name in names:
        status, says = tested(FAULTS[name].tests, name)
        by = re.search(r"^FAILED \S+::(\S+)", says, re.MULTILINE)
        if status == 1 and by:
            print(f"caught      {name:40} by {by[1]}", flush=True)
        else:
            missed.append(name)
            print(f"NOT CAUGHT  {name:40} by {FAULTS[name].tests} (status {status})", flush=True)
    print(f"{len(names) - len(missed)} of {len(names)} caught in {time.time() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
