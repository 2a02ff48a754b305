"""unet-denoiser doctor: why are samples grey, noisy or copies?"""

from pathlib import Path
from typing import Annotated

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import OptionalNumber, OptionalPath
from unet_denoiser.config.base import DeviceName
from unet_denoiser.utils.terminal import printable


def doctor(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    data: OptionalPath = None,
    num_images: OptionalNumber = None,
    num_samples: OptionalNumber = None,
    device: DeviceName = "auto",
) -> None:
    """Look at a run: why are its samples grey, noisy or copies? Writes RUN/doctor.

    Args:
        run: a run directory.
        data: where its training data are now (default: as trained).
        num_images: images that the loss at each noise level is measured on (default: 128; on a CPU 32).
        num_samples: samples to make and to look for among the training images (default: 32; on a CPU 16).
        device: "auto" takes a GPU where there is one.
    """
    with one_line_errors():
        print(printable(f"examining {run} ..."), flush=True)  # the imports alone take seconds
        from unet_denoiser.data.load import check_places, load_data
        from unet_denoiser.evaluation.doctor import diagnose
        from unet_denoiser.training.run import Run
        from unet_denoiser.utils.device import keep_freed_memory, resolve_device

        loaded = Run.load(run)
        if data is None:
            check_places(loaded.data, f"{run}: its", ["source"])
        images = None if data is None else load_data(loaded.with_data(source=str(data)).data)
        resolved = resolve_device(device)
        on_cpu = resolved == "cpu"
        num_images = (32 if on_cpu else 128) if num_images is None else num_images
        num_samples = (16 if on_cpu else 32) if num_samples is None else num_samples
        keep_freed_memory()
        diagnosis = diagnose(loaded, images, num_images=num_images, num_samples=num_samples, device=resolved)
    print(diagnosis.text())
