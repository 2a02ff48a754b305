"""The command `unet-denoiser distill`."""

from pathlib import Path
from typing import Annotated

import tyro

from unet_denoiser.cli import options
from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.train import choose_say, train_to_end


def distill(
    teacher: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    out: options.OptionalPath = None,
    data: options.OptionalName = None,
    distillation: options.DistillationOptions = {},  # noqa: B006
    dataset: options.DataOptions = {},  # noqa: B006
    training: options.TrainingOptions = {},  # noqa: B006
    process: options.ProcessOptions = {},  # noqa: B006
) -> None:
    """Make a network of few steps, without guidance, out of a trained one.

    The result is a run with the teacher's architecture. `sample` samples it in its steps, and `train` with --resume
    goes on with it. Options of training that are not given are the teacher's, but for --steps: a quarter of its own.

    Args:
        teacher: a trained run; or with --data another checkpoint, as `train` takes it for --init.
        out: the run directory to create (default: beside the teacher, such as RUN-4-steps).
        data: images to distil with (default: the teacher's).
    """
    with one_line_errors():
        say = choose_say()
        say(f"reading {teacher} ...")  # the imports alone take seconds
        from unet_denoiser.config.distillation import DistillationConfig
        from unet_denoiser.training.launch import TrainRequest
        from unet_denoiser.training.launch_distillation import start_distillation

        config = DistillationConfig(**distillation)
        request = TrainRequest(data, out, teacher, None, dataset, training, process, distillation=config)
        run, trainer = start_distillation(request, say)
    train_to_end(run, trainer, say)
