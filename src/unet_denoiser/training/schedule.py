"""The learning rate of each step, and when checkpoints and previews are due: at steps, or by time."""

import time
from collections.abc import Callable

import numpy as np

from unet_denoiser.config.training import TrainingConfig, parse_duration

FIRST_PREVIEW = 60  # seconds; the wait then doubles, up to `preview_every`
PREVIEW_SHARE = 0.1  # of the time, at most, where previews come by time
PREVIEW_SECONDS = 60  # that one preview may take


class Interval:
    """Tells when something is due again: every so many steps, or after a time, and then before it is exceeded.

    Args:
        every: steps, or a duration such as "10m".
        first: seconds to wait at first, where a duration is given.
        clock: returns seconds.
    """

    def __init__(
        self, every: int | str, first: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps = every if isinstance(every, int) else None
        self.longest = parse_duration(every) if isinstance(every, str) else 0.0
        self.wait = min(self.longest, first or self.longest)
        self.clock, self.last = clock, clock()

    def is_due(self, step: int, step_seconds: float) -> bool:
        """Return True if it is due at this step, because the next one would end too late."""
        if self.steps is not None:
            return step % self.steps == 0
        return self.clock() - self.last + step_seconds > self.wait

    def restart(self, cost: float = 0.0) -> None:
        """Begin to wait again, twice as long as before up to `longest`, and longer if it takes `cost` seconds."""
        self.last = self.clock()
        self.wait = max(min(2 * self.wait, self.longest), cost * (1 / PREVIEW_SHARE - 1))


class Schedule:
    """Decides at which steps a training saves and previews.

    `due` is called once in each step; the main process's answer counts for all processes.
    """

    def __init__(self, config: TrainingConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.clock = config, clock
        self.checkpoint = Interval(config.checkpoint_every, clock=clock)
        self.preview = Interval(config.preview_every, FIRST_PREVIEW, clock)
        self.step_seconds, self.begun = 0.0, clock()

    def due(self, step: int) -> tuple[bool, bool]:
        """Return (save, preview) for a step that is about to end."""
        self.step_seconds = self.clock() - self.begun
        first, last = step == 1, step == self.config.steps
        kept = self.config.keep_every is not None and step % self.config.keep_every == 0
        save = first or last or kept or self.checkpoint.is_due(step, self.step_seconds)
        return save, last or self.preview.is_due(step, self.step_seconds)

    def end_step(self, *, saved: bool, preview_seconds: float | None) -> None:
        """Begin the next step; its time leaves out that of checkpoints and previews."""
        if saved:
            self.checkpoint.restart()
        if preview_seconds is not None:
            self.preview.restart(preview_seconds)
        self.begun = self.clock()

    def next_checkpoint(self, step: int) -> str:
        """Say when the next checkpoint comes, as in "checkpoint at step 2000" or "checkpoint in 7 min"."""
        if (every := self.checkpoint.steps) is not None:
            return f"checkpoint at step {min(self.config.steps, step // every * every + every)}"
        left = max(0.0, self.checkpoint.last + self.checkpoint.wait - self.clock())
        return f"checkpoint in {left / 60:.0f} min" if left >= 90 else f"checkpoint in {left:.0f} s"

    def most_samples(self, num_inference_steps: int) -> int:
        """Return how many samples a preview can make in a minute, by the time of the last training step."""
        per_image = self.step_seconds / self.config.batch_size / 3  # a backward pass takes about two forward passes
        return max(1, int(PREVIEW_SECONDS / max(1e-9, per_image * num_inference_steps)))


def learning_rate_at(step: int, highest: float, config: TrainingConfig) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine down to zero at the last step."""
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, config.steps - warmup)
    return highest * float(0.5 + 0.5 * np.cos(np.pi * min(1.0, progress)))
