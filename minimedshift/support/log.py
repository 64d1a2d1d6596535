"""What a command tells while it works: a progress line; in training also log.csv and loss.png."""

import sys
import time
from contextlib import suppress

import numpy as np
import torch
from matplotlib.figure import Figure

from minimedshift.support.files import explain_os_error, write_whole

LOOK = 20  # steps from one look at a GPU's losses to the next: no other step waits for it
EVERY = 30  # seconds from one line of a log file to the next


class Ahead:
    """What a run will do, {what: units} in order, and the seconds of a unit, which is a training step. So
    each phase tells the time that is left of the whole run."""
    def __init__(self):
        self.units, self.seconds, self.shown = {}, 0.0, -EVERY

    def line(self, what, text, here, end):
        """A line of phase `what`, which needs `here` seconds more. The next one of a terminal replaces it."""
        while what in self.units:  # earlier phases are over, and this one tells `here`
            del self.units[next(iter(self.units))]
        terminal, now = sys.stdout.isatty(), time.time()
        if terminal or end or now > self.shown + EVERY:
            self.shown, left = now, round(here + self.seconds * sum(self.units.values()))
            end = "\n" if end or not terminal else "\r"
            print(f"{text}, {left // 60}:{left % 60:02d} left   ", end=end)


AHEAD = Ahead()


def progress(done, total, start, what, unit="images"):  # a line of AHEAD
    rate = done / max(time.time() - start, 1e-9)
    AHEAD.line(what, f"{what}: {done}/{total}, {rate:.1f} {unit}/s", (total - done) / rate, done == total)


class Log:
    """log.csv, loss.png and the progress line of a run. out: its folder. first: the step to go on from; rows
    of earlier steps are kept. silent: writes and says nothing."""
    COLUMNS = ("step", "loss", "grad_norm", "lr", "entropy", "cost", "marginal_error", "coupling_seconds",
               "seconds")

    def __init__(self, out, first, steps, batch_size, silent=False):
        self.path, self.silent = out / "log.csv", silent
        self.first, self.steps, self.batch_size = first, steps, batch_size
        self.rows = self.kept_rows() if first and self.path.exists() else []
        if not silent:
            with write_whole(self.path) as work:
                np.savetxt(work, self.rows, "%.6g", ",", header=",".join(self.COLUMNS), comments="")
        self.start, self.pending = time.time(), []
        self.before = self.rows[-1][-1] if self.rows else 0.0  # seconds that earlier processes took

    def __call__(self, step, loss, norm, lr, plan, coupling_seconds, now=False):
        """Note a step. A GPU's numbers are read a few steps late; now: read all."""
        seconds = time.time() - self.start
        self.pending.append((step, loss, norm, lr, *plan, coupling_seconds, self.before + seconds))
        if now or not loss.is_cuda or step % LOOK == 0:
            self.flush()
        each = seconds / (step - self.first)
        if loss.is_cuda and step % LOOK == 0 and LOOK <= step - self.first < 2 * LOOK:
            spent, peak = time.time() - self.start, torch.cuda.max_memory_allocated() / 1e9
            print(f"{1e3 * spent / (step - self.first):.1f} ms a step, the host is busy for "
                  f"{seconds / spent:.0%} of it; at most {peak:.1f} GB")
        if self.rows:
            AHEAD.seconds, loss = each, np.mean([row[1] for row in self.rows[-100:]])
            text = f"step {step}/{self.steps}, loss {loss:.4f}, {self.batch_size / each:.0f} images/s"
            AHEAD.line("training", text, (self.steps - step) * each, step == self.steps)

    def failed(self, count):
        """Whether the last `count` steps that are known had no finite gradient."""
        norms = [norm for _, _, norm, *_ in self.rows[-count:]]
        return len(norms) == count and not np.isfinite(norms).any()

    def kept_rows(self):
        """The rows of steps 1 to `first`: the last line of a killed process may lack its end."""
        rows = []
        for line in self.path.read_text(errors="replace").split("\n")[:-1]:
            with suppress(ValueError):  # the head, or a line that a program or a person has broken
                rows.append([float(cell) for cell in line.split(",")])
        return [row for row in rows if len(row) == len(self.COLUMNS) and row[0] <= self.first]

    def flush(self):
        """Read what is pending, and write it to log.csv."""
        rows = [list(map(float, row)) for row in self.pending]
        self.rows += rows
        self.pending = []
        if rows and not self.silent:
            with explain_os_error(self.path), open(self.path, "a") as file:
                np.savetxt(file, rows, "%.6g", ",")

    def draw(self):
        """loss.png: every step's loss and its running mean."""
        self.flush()
        steps, losses = np.array(self.rows)[:, :2].T
        width = min(50, len(losses))
        smooth = np.convolve(losses, np.full(width, 1 / width), "valid")
        axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
        axes.plot(steps, losses, lw=.5, alpha=.4, label="each step")
        axes.plot(steps[width - 1:], smooth, label=f"mean of {width} steps")
        axes.set(xlabel="step", ylabel=r"loss  $|v - u_t|^2$", yscale="log", title="flow-matching loss")
        axes.legend()
        with write_whole(self.path.parent / "loss.png") as work:
            axes.figure.savefig(work, dpi=100)
