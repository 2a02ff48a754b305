"""A training whose steps, from the second on, or whose previews take long: START_METHOD KIND SECONDS, then options.

The process sleeps in them, which costs no time of the CPU. With the file `slow` it says that it is asleep.
"""

import multiprocessing
import sys
import time
from pathlib import Path

from unet_denoiser.cli.app import main
from unet_denoiser.training import loop
from unet_denoiser.training.trainer import Trainer


def sleep(seconds):
    Path("slow").touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # as many operations of the CPU, between which Python handles signals
        time.sleep(0.05)


def slow_down(kind, seconds):
    if kind == "step":
        clip = Trainer._clip

        def slow_clip(self):
            if self.step >= 1:
                sleep(seconds)
            return clip(self)

        Trainer._clip = slow_clip
    if kind == "preview":
        original = loop.sample

        def slow_sample(*args, on_step, **options):
            def slowly(step):
                sleep(seconds)
                on_step(step)

            return original(*args, on_step=slowly, **options)

        loop.sample = slow_sample
    if kind == "checkpoint":
        from unet_denoiser.training.checkpoints import Checkpoints

        write = Checkpoints.write

        def slow_write(self, tensors, metadata):
            sleep(seconds)
            return write(self, tensors, metadata)

        Checkpoints.write = slow_write


if __name__ == "__main__":
    method, kind, seconds, *options = sys.argv[1:]
    multiprocessing.set_start_method(method)
    slow_down(kind, float(seconds))
    main(["train", *options])
