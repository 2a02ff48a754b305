"""From the options of the distill command to a run and its trainer: `start_distillation`."""

from dataclasses import asdict, replace

from unet_denoiser.config.paths import local_path
from unet_denoiser.training.launch import Say, TrainRequest, start_run
from unet_denoiser.training.run import Run
from unet_denoiser.training.trainer import Trainer

TEACHER_SHARE = 4  # of the teacher's steps; a step of distillation takes two to four times as long as one of training
WARMUP_PART = 6  # of the steps, at most


def start_distillation(request: TrainRequest, say: Say) -> tuple[Run, Trainer]:
    """Return a new run that distils `request.init`, and its trainer; options that are not given are the teacher's.

    ValueError or OSError if an option cannot work.
    """
    teacher, config = request.init, request.distillation
    assert teacher is not None
    assert config is not None
    teacher = local_path(teacher)
    run, fixed = Run.find(teacher), {"condition_dropout": 0.0, "loss_weighting": "constant"}
    out = request.out or teacher.with_name(f"{teacher.stem}-{config.num_steps}-steps")
    if run is None:
        if request.source is None:
            raise ValueError(f"{teacher} is no run, whose data would be known; give --data DATA")
        return start_run(replace(request, out=out, training=fixed | dict(request.training)), say)
    if request.process:
        raise ValueError(f"process.{next(iter(request.process))}: {teacher} has its process; leave it out")
    data, training = asdict(run.data), asdict(run.training)
    source = data.pop("source")
    steps = request.training.get("steps", max(1, run.training.steps // TEACHER_SHARE))
    training |= {
        "steps": steps,
        "warmup_steps": min(run.training.warmup_steps, steps // WARMUP_PART),
        "lora_rank": None,
    }
    return start_run(
        replace(
            request,
            source=request.source or source,
            out=out,
            data=data | dict(request.data),
            training=training | fixed | dict(request.training),
        ),
        say,
    )
