"""What a command tells while it works: a progress line; in training also log.csv and loss.png."""

import sys
import time
from array import array
from contextlib import suppress

import numpy as np
import torch

from minimedshift.support.files import explain_os_error, write_whole


def progress(done, total, start, what, unit="images"):
    """One line that rewrites itself on a terminal; in a log file only the last one appears."""
    if not sys.stdout.isatty() and done < total:
        return
    rate = done / max(time.time() - start, 1e-9)
    left = f"{(total - done) / rate:.0f} s left" if done < total else f"{total / rate:.0f} s"
    end = "\n" if done == total else ""
    print(f"\r{what}: {done}/{total}, {rate:.1f} {unit}/s, {left}   ", end=end, flush=True)


LOOK = 20  # steps from one look at a GPU's losses to the next: no other step waits for it


def row_of(line):
    """The numbers of a line of log.csv, packed: a long run has many."""
    return array("d", map(float, line.split(",")))


class Log:
    """log.csv, loss.png and the progress line."""
    COLUMNS = ("step", "loss", "grad_norm", "lr", "entropy", "cost", "marginal_error", "coupling_seconds",
               "seconds")

    def __init__(self, out, first, steps, batch_size, silent=False, steps_after=0):
        self.out, self.first, self.steps, self.batch_size = out, first, steps, batch_size
        self.path = out / "log.csv"
        lines = self.kept() if first else []
        self.rows = [row_of(line) for line in lines]
        self.silent = silent
        if not silent:
            with write_whole(self.path) as work:
                work.write_text("\n".join([",".join(self.COLUMNS), *lines, ""]))
        self.start, self.shown, self.pending = time.time(), 0.0, []
        self.before = self.rows[-1][-1] if self.rows else 0.0  # seconds that earlier processes took

    def __call__(self, step, loss, norm, lr, plan, coupling_seconds, now=False):
        """Returns (step, loss, gradient norm) of the steps that were read: on a GPU of none but now and then.
        now: read all."""
        seconds = time.time() - self.start
        self.pending.append((step, loss, norm, lr, *plan, coupling_seconds, self.before + seconds))
        known = len(self.rows)
        if now or not loss.is_cuda or step % LOOK == 0:
            self.flush()
        every = 1 if sys.stdout.isatty() else 30
        if self.rows and (seconds - self.shown > every or step == self.steps):
            self.shown = seconds
            rate = (step - self.first) / seconds
            left = round((self.steps - step) / rate)
            end = "\r" if sys.stdout.isatty() and step < self.steps else "\n"
            loss = np.mean(self.column("loss")[-100:])
            print(f"step {step}/{self.steps}  loss {loss:.4f}  {rate * self.batch_size:.0f} images/s  "
                  f"{left // 60}:{left % 60:02d} left  ", end=end, flush=True)
        return [row[:3] for row in self.rows[known:]]

    def failed(self, count):
        """Whether the last `count` steps that are known had no finite gradient."""
        return len(self.rows) >= count and not any(np.isfinite(row[2]) for row in self.rows[-count:])

    def kept(self):
        """The lines of steps 1 to `first`. One that was not written whole is none."""
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        head, *found = text.rpartition("\n")[0].splitlines() or [""]
        lines = []
        for line in found if head == ",".join(self.COLUMNS) else ():
            with suppress(ValueError):
                step, *rest = map(float, line.split(","))
                if step <= self.first and len(rest) == len(self.COLUMNS) - 1:
                    lines.append(line)
        return lines

    def flush(self):
        lines = [",".join(f"{float(cell):.6g}" for cell in row) for row in self.pending]
        self.rows += map(row_of, lines)  # as --resume reads them
        self.pending = []
        if not lines or self.silent:
            return
        with explain_os_error(self.path), open(self.path, "a") as file:
            file.write("\n".join([*lines, ""]))

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
        if not self.rows:
            return
        losses = torch.tensor(self.column("loss"))
        width = min(50, len(losses))
        sheet = Figure(figsize=(7, 3.5), layout="constrained")
        axes = sheet.subplots()
        axes.plot(range(1, len(losses) + 1), losses, lw=.5, alpha=.4, label="each step")
        smooth = losses.unfold(0, width, 1).mean(1)
        axes.plot(range(width, len(losses) + 1), smooth, label=f"mean of {width} steps")
        axes.set(xlabel="step", ylabel=r"loss  $|v - u_t|^2$", yscale="log", title="flow-matching loss")
        axes.legend()
        with write_whole(self.out / "loss.png") as work:
            sheet.savefig(work, dpi=100)
