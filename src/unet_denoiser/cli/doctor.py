"""unet-denoiser doctor: why are samples grey, noisy or copies?"""

from pathlib import Path
from typing import Annotated

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import OptionalPath
from unet_denoiser.config.base import DeviceName


def doctor(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    data: OptionalPath = None,
    num_images: int = 128,
    num_samples: int = 32,
    device: DeviceName = "auto",
) -> None:
    """Look at a run: why are its samples grey, noisy or copies? Writes RUN/doctor.

    Args:
        run: a run directory.
        data: where its training data are now (default: as trained).
        num_images: images that the loss at each noise level is measured on.
        num_samples: samples to make and to look for among the training images.
        device: "auto" takes a GPU where there is one.
    """
    from tqdm import tqdm

    with one_line_errors():
        from unet_denoiser.data.load import check_places, load_data
        from unet_denoiser.evaluation.doctor import NUM_SAMPLING_STEPS, diagnose
        from unet_denoiser.training.run import Run
        from unet_denoiser.utils.device import resolve_device

        loaded = Run.load(run)
        if data is None:
            check_places(loaded.data, f"{run}: its", ["source"])
        images = None if data is None else load_data(loaded.with_data(source=str(data)).data)
        with tqdm(total=num_samples * NUM_SAMPLING_STEPS, unit="step", disable=None) as bar:
            diagnosis = diagnose(
                loaded,
                images,
                num_images=num_images,
                num_samples=num_samples,
                device=resolve_device(device),
                on_step=lambda step: bar.update(len(step.x)),
            )
    print(diagnosis.text())
