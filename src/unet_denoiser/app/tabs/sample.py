"""The tab that samples: a picture forms step by step."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

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
    suggest_count,
)
from unet_denoiser.app.workshop import Workshop


def sample_tab(page: gr.Blocks, sources: Sources, workshop: Workshop) -> None:
    """Build the tab: inputs at the left, the picture at the right."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            source = choose_network(page, sources)
            panel = make_panel(16)
            with gr.Row():
                start = gr.Button("Sample", variant="primary", elem_id="sample-start")
                stop = gr.Button("Stop", elem_id="sample-stop")
        with gr.Column(scale=3):
            message = gr.HTML(elem_id="sample-message")
            picture = make_picture("sample-picture", 560)

    @refuse_in_one_line(len(panel.outputs))
    def show(name: str | None) -> Any:
        inputs = workshop.read_inputs(sources.find_network(name))
        text = "this network begins with an image: see Edit" if inputs.needs_image else ""
        return note(text), *show_inputs(inputs, suggest_count(inputs))

    @refuse_while_streaming(1)
    def run(request: gr.Request, name: str | None, *values: Any) -> Iterator[Any]:
        yield note("reading the network ..."), gr.skip()
        network = sources.find_network(name)
        form = read_form(values, workshop.read_inputs(network))
        for frame in workshop.stream(str(request.session_hash), network, form):
            yield note(frame.text), frame.picture

    source.change(show, source, [message, *panel.outputs], **LOOK)
    start.click(run, [source, *panel.fields], [message, picture], **JOB)
    stop.click(stop_generation(workshop), queue=False)
