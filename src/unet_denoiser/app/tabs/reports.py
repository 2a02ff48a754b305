"""The tab of reports: what doctor and evaluate found."""

from typing import Any

import gradio as gr

from unet_denoiser.app.messages import note
from unet_denoiser.app.pictures import show_pictures
from unet_denoiser.app.reports import read_doctor, read_evaluation
from unet_denoiser.app.sources import Sources
from unet_denoiser.app.tabs.handlers import refuse_in_one_line
from unet_denoiser.app.tabs.network import LOOK, offer_names


def reports_tab(page: gr.Blocks, sources: Sources, tab: gr.Tab) -> None:
    """Build the tab: the reports of a run, below each other, with their pictures."""
    run = gr.Dropdown([], label="Run", elem_id="reports-run")
    offer_names(page, run, sources.runs)
    message = gr.HTML()
    outputs: list[Any] = []
    for title, name in (("Doctor: why are samples grey, noisy or copies?", "doctor"), ("Evaluation", "evaluation")):
        gr.Markdown(f"## {title}")
        text = gr.Markdown(elem_id=f"reports-{name}", elem_classes="ud-report")
        pictures = gr.HTML(elem_id=f"reports-{name}-pictures")
        outputs += [text, pictures]

    @refuse_in_one_line(len(outputs))
    def show(name: str | None) -> Any:
        path = sources.find_run(name)
        sections = (read_doctor(path), read_evaluation(path))
        return note(""), *(part for one in sections for part in (one.text, show_pictures(one.pictures)))

    gr.on([run.change, tab.select], show, run, [message, *outputs], **LOOK)
