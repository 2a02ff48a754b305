"""The command `unet-denoiser export`."""

from pathlib import Path
from typing import Annotated

import tyro

from unet_denoiser.cli import options
from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.config.export import ExportConfig
from unet_denoiser.utils.terminal import printable


def export(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    export: options.ExportOptions = {},  # noqa: B006
    checkpoint: str = "latest",
    vae: options.OptionalName = None,
    text_encoder: options.OptionalName = None,
) -> None:
    """Export a trained network to ONNX, OpenVINO or a program of torch, for use without this package.

    OUT is a new folder with the network, its noise levels (schedule.json), an example of its inputs and output
    (example.npz), and a README.md with the code that calls it and samples with it. Before it is put there, the file's
    output is compared with the network's at several noise levels and sizes, and refused if it differs too much.

    Args:
        source: a run directory, a saved model or a published pipeline, as for `sample`.
        target: the folder to write.
        checkpoint: "latest", a step's number, or "best": the lowest smoothed training loss of those that are kept.
        vae: of a single file with the weights of a network: folder of its autoencoder, or of a pipeline that has it.
        text_encoder: likewise: folder of its text encoder and tokenizer, or of a pipeline that has them.
    """
    with one_line_errors():
        config = ExportConfig(**export)
        if target.exists():
            raise FileExistsError(f"{target} exists; give a new name")
        from unet_denoiser.export.exporter import require_libraries
        from unet_denoiser.sampling.pipeline.exporting import export_pipeline
        from unet_denoiser.training.pipelines import load_pipeline
        from unet_denoiser.utils.files import check_writable

        require_libraries(config)
        check_writable(target.parent)
        pipeline = load_pipeline(source, "cpu", checkpoint=checkpoint, vae=vae, text_encoder=text_encoder)
        report = export_pipeline(pipeline, target, config)
        calls = f"{len(report.checked)} calls"
        print(
            printable(f"{target}: {config.to}, {config.precision}; error {report.error:.1e} of the output in {calls}")
        )
