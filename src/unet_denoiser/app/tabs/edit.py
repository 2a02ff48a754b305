"""The tab that edits an uploaded image."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from unet_denoiser.app.form import Inputs
from unet_denoiser.app.messages import note
from unet_denoiser.app.sources import Sources
from unet_denoiser.app.tabs.handlers import refuse_in_one_line, refuse_while_streaming
from unet_denoiser.app.tabs.network import (
    JOB,
    LOOK,
    choose_network,
    make_panel,
    make_picture,
    read_form,
    show_inputs,
    stop_generation,
)
from unet_denoiser.app.uploads import check_upload, make_edit
from unet_denoiser.app.workshop import Workshop
from unet_denoiser.config.editing import DEFAULT_STRENGTH

TASKS = {  # in the words of the page
    "vary": "Vary",
    "inpaint": "Inpaint: paint over what shall be new",
    "outpaint": "Outpaint: add margins",
    "upscale": "Upscale",
    "translate": "Translate",
}
COUNT = 4  # edited versions, by default


def edit_tab(page: gr.Blocks, sources: Sources, workshop: Workshop) -> None:
    """Build the tab: inputs at the left, the uploaded image and the result at the right."""
    uploaded = gr.State(None)  # the file's path; a page cannot name another one
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            source = choose_network(page, sources)
            task = gr.Dropdown([], label="Edit", elem_id="edit-task")
            options = _make_options()
            panel = make_panel(COUNT)
            with gr.Row():
                start = gr.Button("Edit", variant="primary", elem_id="edit-start")
                stop = gr.Button("Stop")
        with gr.Column(scale=3):
            message = gr.HTML(elem_id="edit-message")
            upload = gr.UploadButton("Upload an image", size="sm", elem_id="edit-upload")
            with gr.Row():
                canvas = _make_canvas()
                picture = make_picture("edit-picture", 400)
    shown = [*options.values()]

    @refuse_in_one_line(1 + len(shown) + len(panel.outputs))
    def show(name: str | None) -> Any:
        inputs = workshop.read_inputs(sources.find_network(name))
        choices = [(TASKS[one], one) for one in inputs.tasks]
        first = inputs.tasks[0] if inputs.tasks else None
        text = "" if choices else "this network makes no images"
        updates = [gr.update(choices=choices, value=first), *_show_options(first, inputs)]
        return note(text), *updates, *show_inputs(inputs, COUNT)

    @refuse_in_one_line(1 + len(shown))
    def show_task(name: str | None, chosen: str | None, file: str | None) -> Any:
        inputs = workshop.read_inputs(sources.find_network(name))
        image = (
            gr.skip() if file is None else workshop.read_canvas(name or "", Path(file), keep_size=chosen == "upscale")
        )
        return note(""), image, *_show_options(chosen, inputs)

    @refuse_in_one_line(2)
    def receive(name: str | None, chosen: str | None, file: str | None) -> Any:
        network = sources.find_network(name)
        path = check_upload(file)
        image = workshop.read_canvas(network, path, keep_size=chosen == "upscale")
        return note(f"{path.name}, as the network sees it"), str(path), gr.update(value=image, visible=True)

    @refuse_while_streaming(1)
    def run(request: gr.Request, name: str | None, chosen: str, file: str | None, *values: Any) -> Iterator[Any]:
        yield note("reading the network ..."), gr.skip()
        network, path = sources.find_network(name), check_upload(file)
        inputs = workshop.read_inputs(network)
        strength, top, right, bottom, left, factor, resample, painted, *form = values
        layers = (painted or {}).get("layers") or []
        edits = {"strength": strength, "margins": (top, right, bottom, left), "factor": factor, "resample": resample}
        with TemporaryDirectory(prefix="unet-denoiser-") as folder:
            edit, concat = make_edit(chosen, path, inputs, edits | {"layers": layers}, Path(folder))
            filled = read_form(tuple(form), inputs)
            for frame in workshop.stream(str(request.session_hash), network, filled, edit, concat):
                yield note(frame.text), frame.picture

    source.change(show, source, [message, task, *shown, *panel.outputs], **LOOK)
    task.input(show_task, [source, task, uploaded], [message, canvas, *shown], **LOOK)
    upload.upload(receive, [source, task, upload], [message, uploaded, canvas], **LOOK)
    start.click(run, [source, task, uploaded, *shown, canvas, *panel.fields], [message, picture], **JOB)
    stop.click(stop_generation(workshop), queue=False)


def _make_options() -> dict[str, Any]:
    """Create the inputs that belong to one way of editing or another."""
    strength = gr.Slider(0.05, 1, DEFAULT_STRENGTH, step=0.05, label="Strength")
    with gr.Row():
        margins = {
            name: gr.Number(value, label=name.capitalize(), visible=False, min_width=60)
            for name, value in (("top", 0), ("right", 4), ("bottom", 0), ("left", 4))
        }
    factor = gr.Number(2, label="Factor", visible=False)
    resample = gr.Number(1, label="Repeats of each step (above 1: sampler ddim)", visible=False)
    return {"strength": strength, **margins, "factor": factor, "resample": resample}


def _make_canvas() -> Any:
    """Create the canvas: it takes no file itself, since uploads are checked first, and one brush paints the mask."""
    brush: Any = gr.Brush(default_size=40, colors=["#ff7f0e"], default_color="#ff7f0e", color_mode="fixed")
    layout: Any = {"layers": False, "transforms": (), "sources": (), "height": 400, "elem_id": "edit-canvas"}
    look: Any = {"show_label": False, "format": "png", "buttons": [], "min_width": 240}
    look["visible"] = False  # until there is an image: an empty one would take files
    return gr.ImageEditor(type="pil", image_mode="RGBA", brush=brush, **look, **layout)


def _show_options(task: str | None, inputs: Inputs) -> list[Any]:
    """Return the updates of the options, in the order of `_make_options`."""
    paints, margins = task in ("inpaint", "outpaint"), task == "outpaint"
    is_free = task == "upscale" and not inputs.needs_image
    return [gr.update(visible=shown) for shown in (task == "vary", *[margins] * 4, is_free, paints)]
