"""The network of all tabs, one at a time, and generations that can be stopped."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.config.paths import local_path

if TYPE_CHECKING:
    from unet_denoiser.app.generation import Form, PipelineHolder
    from unet_denoiser.app.inputs import Inputs


class Workshop:
    """Reads networks and generates with them; the modules that need torch are imported with the first of them."""

    def __init__(self) -> None:
        self._holder: PipelineHolder | None = None
        self._lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def warm_up(self, networks: Sequence[str]) -> None:
        """Import all that a first sample needs, and read the first network that is on this machine."""
        self._open()
        for source in [name for name in networks if local_path(name).exists()][:1]:
            with suppress(Exception):  # the page says what is wrong with it
                self.read_inputs(source)

    def read_inputs(self, source: str) -> "Inputs":
        """Return the inputs of the network of a run or pipeline."""
        from unet_denoiser.app.inputs import read_inputs

        return read_inputs(self._open().load(source))

    def read_canvas(self, source: str, file: Path, *, keep_size: bool) -> Any:
        """Return an uploaded image as a network sees it, see `uploads.make_canvas`."""
        from unet_denoiser.app.uploads import make_canvas

        return make_canvas(self._open().load(source), file, keep_size=keep_size)

    def stream(
        self, page: str, source: str, form: "Form", edit: EditingConfig | None = None, concat: Path | None = None
    ) -> Iterator[Any]:
        """Generate what a form asks for and yield frames, see `generation.stream`; `stop(page)` ends it."""
        from unet_denoiser.app.generation import make_request, stream

        pipeline = self._open().load(source)
        request = make_request(pipeline, form, edit, concat)
        stop = self._stops[page] = threading.Event()
        try:
            yield from stream(pipeline, request, stop)
        finally:
            self._stops.pop(page, None)

    def stop(self, page: str) -> None:
        """Ask the generation of a page to stop; does nothing if there is none."""
        if (event := self._stops.get(page)) is not None:
            event.set()

    def _open(self) -> "PipelineHolder":
        with self._lock:
            if self._holder is None:
                from unet_denoiser.app.generation import PipelineHolder

                self._holder = PipelineHolder()
            return self._holder
