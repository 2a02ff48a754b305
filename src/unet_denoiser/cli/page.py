"""unet-denoiser app: a page to sample, edit, train and look at reports in a browser."""

from typing import Annotated

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import OptionalPath


def app(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help_behavior_hint="")] = (
        "runs",
    ),
    *,
    data: OptionalPath = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Open a page in the browser: sample, edit, watch and start trainings, read reports. Needs the extra `app`.

    The page reads and writes only in the folders named here. Trainings are processes of their own: they go on when the
    page ends, and the next page finds them.

    Args:
        runs: run directories, folders of them, and published pipelines' folders or hub names (default: runs). New runs
            go to the first folder of runs.
        data: a folder of data to train on: itself, its sub-folders, and its .npz, .npy and .parquet files.
        host: the address to listen at; only this machine reaches 127.0.0.1. The page has no password.
        port: the port to listen at.
    """
    with one_line_errors():
        from unet_denoiser.app.sources import Sources

        sources = Sources.from_arguments(runs, data)
        print("opening the page ...", flush=True)  # the imports alone take seconds
        try:
            import gradio  # noqa: F401
        except ImportError:
            raise ImportError("the page needs gradio: pip install 'unet-denoiser[app]'") from None
        from unet_denoiser.app.page import serve

        serve(sources, host, port)
