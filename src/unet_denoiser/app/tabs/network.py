"""The inputs that samples and edits share: a network, what it is asked for, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from unet_denoiser.app.form import SAMPLERS, Form, Inputs
from unet_denoiser.app.sources import Sources
from unet_denoiser.app.workshop import Workshop

# of events: one generation at a time, the others wait; looking at something need not wait for it
JOB: Any = {"concurrency_id": "job", "concurrency_limit": 1, "show_progress": "hidden"}
LOOK: Any = {"concurrency_id": "look", "concurrency_limit": 4, "show_progress": "hidden"}


@dataclass(frozen=True)
class NetworkPanel:
    """The components of the inputs; `fields` are those of `Form`, in its order."""

    about: Any
    fields: list[Any]

    @property
    def outputs(self) -> list[Any]:
        """The components that `show_inputs` updates."""
        return [self.about, *self.fields]


def choose_network(page: gr.Blocks, sources: Sources) -> Any:
    """Create the choice of a run or pipeline."""
    source = gr.Dropdown([], label="Run or pipeline", elem_classes="ud-source")
    offer_names(page, source, sources.networks)
    return source


def offer_names(page: gr.Blocks, choice: Any, list_names: Callable[[], list[str]]) -> None:
    """List the names of a choice when the page is loaded and when it is opened; the first is chosen if none is."""

    def update(name: str | None) -> Any:
        names = list_names()
        return gr.update(choices=names, value=name if name in names else next(iter(names), None))

    gr.on([page.load, choice.focus], update, choice, choice, **LOOK)


def make_panel(count: int) -> NetworkPanel:
    """Create the inputs of a form; those that a network may lack are hidden until one is read."""
    about = gr.HTML(elem_classes="ud-about")
    classes = gr.Dropdown([], multiselect=True, label="Class (none: all in turn)", visible=False)
    caption = gr.Textbox(label="Caption", lines=2, visible=False)
    vector = gr.Textbox(label="Numbers", visible=False)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=None, min_width=80)
        number = gr.Number(count, label="Images", min_width=80)
    with gr.Row():
        steps = gr.Number(label="Steps", min_width=80)
        guidance = gr.Number(label="Guidance", step=0.5, min_width=80, visible=False)
    with gr.Accordion("More", open=False):
        sampler = gr.Dropdown(list(SAMPLERS), label="Sampler")
        negative_class = gr.Dropdown([], label="Negative class", visible=False)
        negative_caption = gr.Textbox(label="Negative caption", visible=False)
    fields = [classes, caption, vector, negative_class, negative_caption, seed, number, steps, guidance, sampler]
    return NetworkPanel(about, fields)


def make_picture(name: str, height: int) -> Any:
    """Create the picture that forms."""
    look: Any = {"height": height, "elem_id": name, "elem_classes": "ud-picture", "min_width": 240}
    return gr.Image(show_label=False, format="png", interactive=False, buttons=["download", "fullscreen"], **look)


def stop_generation(workshop: Workshop) -> Callable[[gr.Request], None]:
    """Return the handler that stops the generation of the page that asks."""

    def handle(request: gr.Request) -> None:
        workshop.stop(str(request.session_hash))

    return handle


def suggest_count(inputs: Inputs) -> int:
    """Return a number of images that shows each class equally often."""
    each = max(2, 16 // max(1, len(inputs.classes)))
    return min(20, each * len(inputs.classes)) if inputs.classes else 16


def show_inputs(inputs: Inputs, count: int) -> list[Any]:
    """Return the updates of a panel for a network: its inputs and their defaults, and what it is in a line."""
    classes, guided, free = list(inputs.classes), inputs.is_guided, not inputs.fixed
    size = " x ".join(map(str, inputs.size))
    about = f"images of {size}" + (f"; {inputs.fixed}" if inputs.fixed else "")
    return [
        f'<div class="ud-note">{about}</div>',
        gr.update(choices=classes, value=[], visible=bool(classes)),
        gr.update(value="", visible=inputs.captions),
        gr.update(value="", visible=inputs.vector > 0, label=f"Numbers, {inputs.vector} of them"),
        gr.update(choices=classes, value=None, visible=bool(classes) and guided and free),
        gr.update(value="", visible=inputs.captions and guided and free),
        gr.skip(),
        gr.update(value=count),
        gr.update(value=inputs.steps, interactive=free),
        gr.update(value=inputs.guidance, visible=guided or not free, interactive=guided),
        gr.update(value=inputs.sampler, interactive=free),
    ]


def read_form(values: tuple[Any, ...], inputs: Inputs) -> Form:
    """Return the form of a panel's values; steps and guidance that are fixed are left to the network."""
    classes, caption, vector, negative_class, negative_caption, seed, number, steps, guidance, sampler = values
    free = not inputs.fixed
    return Form(
        classes=tuple(classes or ()),
        caption=caption or "",
        vector=vector or "",
        negative_class=negative_class,
        negative_caption=negative_caption or "",
        seed=seed,
        count=number,
        steps=_given("steps", steps) if free else None,
        guidance=_given("guidance", guidance) if inputs.is_guided else None,
        sampler=sampler if free else None,
    )


def _given(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"{name} is empty; give a number")
    return float(value)
