"""What a command tells while it works: a progress line; in training also log.csv and loss.png."""

import os
import sys
import time

import numpy as np
import torch

from minimedshift.support.files import whole


def progress(done, total, start, what, unit="images"):
    """One line that rewrites itself on a terminal; in a log file only the last one appears."""
    if not sys.stdout.isatty() and done < total:
        return
    rate = done / max(time.time() - start, 1e-9)
    left = f"{(total - done) / rate:.0f} s left" if done < total else f"{total / rate:.0f} s"
    end = "\n" if done == total else ""
    print(f"\r{what}: {done}/{total}, {rate:.1f} {unit}/s, {left}   ", end=end, flush=True)


LOOK = 20  # steps from one look at a GPU's losses to the next: no other step waits for it


class Log:
    """log.csv, loss.png and the progress line."""
    COLUMNS = ("step", "loss", "grad_norm", "lr", "entropy", "cost", "marginal_error", "coupling_seconds",
               "seconds")

    def __init__(self, out, first, steps, batch_size, silent=False):
        self.out, self.first, self.steps, self.batch_size = out, first, steps, batch_size
        path = out / "log.csv"
        lines = path.read_text().splitlines() if first and path.exists() else []
        lines = lines[1:first + 1] if lines[:1] == [",".join(self.COLUMNS)] else []
        self.rows = [[float(cell) for cell in line.split(",")] for line in lines]
        self.file = open(os.devnull if silent else path, "w", buffering=1)
        self.file.write("\n".join([",".join(self.COLUMNS), *lines, ""]))
        self.start, self.shown, self.pending = time.time(), 0.0, []
        self.before = self.rows[-1][-1] if self.rows else 0.0  # seconds that earlier processes took

    def __call__(self, step, loss, norm, lr, plan, coupling_seconds, now=False):
        """Returns (step, loss, gradient norm) of the steps that were read: on a GPU of none but now and then.
        now: read all."""
        seconds = time.time() - self.start
        self.pending.append((step, loss, norm, lr, *plan[1:], coupling_seconds, self.before + seconds))
        known = len(self.rows)
        if now or not loss.is_cuda or step % LOOK == 0:
            self.flush()
        every = 1 if sys.stdout.isatty() else 30
        if seconds - self.shown > every or step == self.steps:
            self.shown = seconds
            rate = (step - self.first) / seconds
            left = round((self.steps - step) / rate)
            end = "\r" if sys.stdout.isatty() and step < self.steps else "\n"
            if not self.rows:
                self.flush()
            loss = np.mean(self.column("loss")[-100:])
            print(f"step {step}/{self.steps}  loss {loss:.4f}  {rate * self.batch_size:.0f} images/s  "
                  f"{left // 60}:{left % 60:02d} left  ", end=end, flush=True)
        return [row[:3] for row in self.rows[known:]]

    def flush(self):
        for row in self.pending:
            self.rows.append([float(cell) for cell in row])
            self.file.write(",".join(f"{cell:.6g}" for cell in self.rows[-1]) + "\n")
        self.pending = []

    def column(self, name):
        return [row[self.COLUMNS.index(name)] for row in self.rows]

    def means(self):
        """What the coupling was and cost, for the report: means over the run, and its share of the time."""
        self.flush()
        mean = lambda name: float(np.mean(self.column(name) or [0.0]))
        spent = sum(self.column("coupling_seconds")) / self.column("seconds")[-1] if self.rows else 0.0
        return dict(entropy=mean("entropy"), cost=mean("cost"), marginal_error=mean("marginal_error"),
                    share_of_time=spent)

    def coupling(self):
        m = self.means()
        return (f"coupling: normalised entropy {m['entropy']:.3f}, cost {m['cost']:.3f} of independent, "
                f"marginal error {m['marginal_error']:.1g}, {m['share_of_time']:.1%} of the time")

    def draw(self):
        """loss.png: every step's loss and its running mean."""
        from matplotlib.figure import Figure
        self.flush()
        losses = torch.tensor(self.column("loss"))
        width = min(50, len(losses))
        sheet = Figure(figsize=(7, 3.5), layout="constrained")
        axes = sheet.subplots()
        axes.plot(range(1, len(losses) + 1), losses, lw=.5, alpha=.4, label="each step")
        smooth = losses.unfold(0, width, 1).mean(1)
        axes.plot(range(width, len(losses) + 1), smooth, label=f"mean of {width} steps")
        axes.set(xlabel="step", ylabel=r"loss  $|v - u_t|^2$", yscale="log", title="flow-matching loss")
        axes.legend()
        with whole(self.out / "loss.png") as work:
            sheet.savefig(work, dpi=100)
