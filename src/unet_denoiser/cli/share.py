"""unet-denoiser share: a run as a folder or hub repository for others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import OptionalName
from unet_denoiser.config.base import DeviceName
from unet_denoiser.config.paths import is_hub_name, local_path
from unet_denoiser.utils.terminal import printable

if TYPE_CHECKING:
    from unet_denoiser.training.run import Run


def share(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER_OR_HUB_NAME")],
    *,
    license: OptionalName = None,  # the option's name
    device: DeviceName = "auto",
) -> None:
    """Share a run: its network in our format and for diffusers, with samples and a card, in a folder or on the hub.

    The card README.md has a picture of samples, what is recorded of the data, the figures of `evaluate` if there are
    any, and the code that samples. `unet-denoiser sample` takes the folder or name as it takes a run.

    Args:
        run: a run directory.
        target: where to: a repository on the Hugging Face hub, owner/name; or a new folder: any other path, such as
            digits or ./shared/digits, and also owner/name where `owner` is a folder here.
        license: the licence of the weights, which is needed, as the hub names it: mit, apache-2.0, cc-by-4.0,
            cc-by-nc-4.0, openrail or other.
        device: of the sampling; "auto" takes a GPU if there is one.
    """
    with one_line_errors():
        _check_licence(license)
        owner, _, name = target.partition("/")
        to_hub = is_hub_name(target) and bool(name) and not Path(owner).is_dir()
        if to_hub:
            from huggingface_hub.utils import validate_repo_id

            validate_repo_id(target)
        elif local_path(target).exists():
            raise FileExistsError(f"{target} exists; give a new name")
        print(f"reading {printable(run)} ...", flush=True)  # the imports alone take seconds
        from unet_denoiser.training.run import Run
        from unet_denoiser.training.sharing import share as share_run
        from unet_denoiser.utils.device import resolve_device
        from unet_denoiser.utils.files import check_writable

        found, place = Run.load(run), resolve_device(device)
        assert license is not None
        if to_hub:
            lacks, shown = _upload(found, target, license, place)
        else:
            folder = local_path(target)
            check_writable(folder.parent)
            lacks, shown = share_run(found, folder, f"./{folder.resolve().name}", license, place), printable(folder)
    if lacks is not None:
        print(printable(f"without a copy for diffusers: {lacks}"))
    print(shown)


def _check_licence(name: str | None) -> None:
    examples = "mit, apache-2.0, cc-by-4.0, cc-by-nc-4.0, openrail or other"
    if name is None:
        raise ValueError(f"license is not given; say what others may do with the weights: {examples}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise ValueError(f"license={name!r} is no licence as the hub writes them; valid are {examples}")


def _upload(run: Run, name: str, licence: str, device: str) -> tuple[str | None, str]:
    """Write a run into a temporary folder and upload it; return what it lacks for diffusers, and its address."""
    from huggingface_hub import HfApi

    from unet_denoiser.training.sharing import PARTS
    from unet_denoiser.training.sharing import share as share_run

    api = HfApi()
    with _describe_hub_errors(name):
        api.whoami()  # asks for a login before the work
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, name.partition("/")[2])
        lacks = share_run(run, folder, name, licence, device)
        with _describe_hub_errors(name):
            url = api.create_repo(name, exist_ok=True)
            message = "Shared by unet-denoiser"
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=list(PARTS))
    return lacks, str(url)


@contextmanager
def _describe_hub_errors(name: str) -> Iterator[None]:
    """Turn any error of the hub into one OSError."""
    try:
        yield
    except Exception as error:  # of huggingface_hub, or of the library below it, which changes
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise OSError(
            f"{name} cannot be uploaded: {reason[0]}; `hf auth login` logs in, and ./{name} is a folder"
        ) from None
