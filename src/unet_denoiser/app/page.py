"""The page, and the server that shows it."""

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is sent to anyone

import gradio as gr
from starlette.middleware import Middleware

from unet_denoiser.app.guard import NoForeignFiles
from unet_denoiser.app.sources import Sources
from unet_denoiser.app.tabs.edit import edit_tab
from unet_denoiser.app.tabs.reports import reports_tab
from unet_denoiser.app.tabs.sample import sample_tab
from unet_denoiser.app.tabs.training import training_tab
from unet_denoiser.app.workshop import Workshop
from unet_denoiser.utils.terminal import printable

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_UPLOAD = 20 * 2**20  # bytes of an uploaded file
MAX_WAITING = 16  # jobs that wait for the one that runs; a further one is refused
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # those of the reader's system: none is fetched


def build_page(sources: Sources, workshop: Workshop) -> gr.Blocks:
    """Build the page with its tabs."""
    with gr.Blocks(title="unet-denoiser", analytics_enabled=False) as page:
        gr.Markdown("# unet-denoiser", elem_classes="ud-title")
        with gr.Tab("Sample"):
            sample_tab(page, sources, workshop)
        with gr.Tab("Edit"):
            edit_tab(page, sources, workshop)
        with gr.Tab("Training"):
            training_tab(page, sources)
        with gr.Tab("Reports") as reports:
            reports_tab(page, sources, reports)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def serve(sources: Sources, host: str, port: int) -> None:
    """Show the page until SIGINT or SIGTERM; OSError or ValueError if the address cannot be used."""
    _check_address(host, port)
    workshop = Workshop()
    with TemporaryDirectory(prefix="unet-denoiser-page-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # read when the components are made
        page = build_page(sources, workshop)
        workshop.warm_up(
            sources.networks()
        )  # before the server listens: imports in the background would make the first page slow
        page.launch(**launch_options(host, port))
        print(f"the page is at http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}; Ctrl+C ends it", flush=True)
        if host not in LOOPBACK:
            print(f"host={host}: whoever reaches this address can use the page; nothing asks who it is", flush=True)
        try:
            _wait_for_signal()
        finally:
            page.close(verbose=False)


def launch_options(host: str, port: int) -> dict[str, Any]:
    """Return the options of gradio's server: no file of this machine is served, and nothing is fetched."""
    fonts, mono = FONTS
    css = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return {
        "server_name": host,
        "server_port": port,
        "prevent_thread_lock": True,
        "quiet": True,
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,
        "mcp_server": False,
        "footer_links": [],
        "allowed_paths": [],
        "app_kwargs": {"middleware": [Middleware(NoForeignFiles)], "docs_url": None, "redoc_url": None},
        "max_file_size": MAX_UPLOAD,
        "theme": gr.themes.Default(font=list(fonts), font_mono=list(mono)),
        "css": css,
    }


def _check_address(host: str, port: int) -> None:
    """Raise ValueError or OSError if no server can listen there."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port={port} must be from 1 to 65535, for example 7860")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ValueError(f"host={host!r} is no address of this machine; give 127.0.0.1, or 0.0.0.0 for all") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(f"port={port} of host={host} cannot be used: {error.strerror}; give another one") from None


def _wait_for_signal() -> None:
    """Wait for SIGINT or SIGTERM."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    while not ended.wait(1.0):  # without a limit, Windows would not see the signal
        pass
    print(printable(" the page has ended; trainings go on"), file=sys.stderr)
