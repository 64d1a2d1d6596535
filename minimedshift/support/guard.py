"""What if training fails? A loss or a gradient that is no number, or a loss that jumps: training goes back to
the last good weights and on with the next batches. Where that happens again and again, it stops."""

import copy
import math

from minimedshift.support.command import UserError

EVERY = 100  # steps from one kept state to the next
JUMP = 10    # times the largest loss before the kept state: more is a fault
MOST = 5     # faults in a run


class Guard:
    """Keeps a copy of the weights, their mean and the optimizers; `watch` it after every step."""

    def __init__(self, model, optimizers, ema, first=0):
        self.model, self.optimizers, self.ema = model, optimizers, ema
        self.faults, self.limit, self.recent = 0, math.inf, []
        self.keep(first)

    def keep(self, step):
        """The state of now is the one to go back to."""
        self.step = step
        self.weights = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.mean = {name: p.clone() for name, p in self.ema.mean.items()}
        self.moments = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]
        if self.recent:
            self.limit, self.recent = JUMP * max(self.recent), []

    def watch(self, step, rows):
        """rows: (step, loss, gradient norm) of the steps that were read since the last call, `step` the last.

        Goes back if one is at fault, and says so. Raises UserError after too many faults."""
        for at, loss, norm in rows:
            if not (loss < self.limit and math.isfinite(norm)):
                return self.go_back(at, loss, norm)
        self.recent += [loss for _, loss, _ in rows]
        if rows and step % EVERY == 0:
            self.keep(step)

    def go_back(self, at, loss, norm):
        self.faults += 1
        self.recent = []
        self.model.load_state_dict(self.weights)
        self.ema.load(self.mean)
        for optimizer, moments in zip(self.optimizers, self.moments):
            optimizer.load_state_dict(copy.deepcopy(moments))
        what = f"step {at:.0f} has loss {loss:.3g} and gradient norm {norm:.3g}"
        if self.faults > MOST:
            raise UserError(f"{what}, fault {self.faults} of this run: start anew with a smaller --lr, "
                            "or with --dtype float32")
        print(f"\n{what}: back to the weights after step {self.step}, on with the next batches", flush=True)
