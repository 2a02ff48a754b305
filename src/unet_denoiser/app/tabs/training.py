"""The tab of trainings: look at one while it runs; start, stop and resume."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from unet_denoiser.app.form import parse_number
from unet_denoiser.app.messages import note
from unet_denoiser.app.pictures import show_figure, show_pictures
from unet_denoiser.app.sources import Sources
from unet_denoiser.app.tabs.handlers import refuse_in_one_line
from unet_denoiser.app.tabs.network import LOOK, offer_names
from unet_denoiser.config.paths import local_path

REFRESH_SECONDS = 2.0
MAX_PREVIEWS, PREVIEW_SIDE = 12, 150  # the latest ones are shown; pixels of the shorter side, at least
DO: Any = {"concurrency_id": "training", "concurrency_limit": 1, "show_progress": "hidden"}


def training_tab(page: gr.Blocks, sources: Sources) -> None:
    """Build the tab: runs and what to do with them at the left, the state of one at the right."""
    seen = gr.State(())
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            run = gr.Dropdown([], label="Run")
            offer_names(page, run, sources.runs)
            steps = gr.Textbox(label="Steps in total, to resume", placeholder="as before")
            with gr.Row():
                stop = gr.Button("Stop", elem_id="training-stop")
                resume = gr.Button("Resume", elem_id="training-resume")
            with gr.Accordion("New training", open=not sources.runs()):
                fields = _make_fields(sources)
                start = gr.Button("Start", variant="primary", elem_id="training-start")
        with gr.Column(scale=3):
            message = gr.HTML(elem_id="training-message")
            state = gr.HTML(elem_id="training-state")
            plot = gr.HTML(elem_id="training-plot")
            previews = gr.HTML(elem_id="training-previews")
            with gr.Accordion("Log", open=False):
                log = gr.HTML()
    looked = [state, plot, previews, log, seen]

    @refuse_in_one_line(len(looked) - 1)
    def look(name: str | None, before: tuple[Any, ...]) -> Any:
        from unet_denoiser.app.training_state import LOG_NAME, read_log, read_training

        if name is None:
            return note("no run is chosen"), "", "", "", ()
        path = sources.find_run(name)
        found, log_text = read_training(path), _show_log(read_log(path / LOG_NAME))
        marks = (name, len(found.metrics), tuple(file.name for file in found.previews), found.status)
        if marks == tuple(before):  # nothing to draw anew
            return _describe(found), gr.skip(), gr.skip(), log_text, gr.skip()
        return _describe(found), _draw(found.metrics), _show_previews(found.previews), log_text, marks

    @refuse_in_one_line(1)
    def begin(*values: Any) -> Any:
        from unet_denoiser.app.training_process import start_training

        data, name, *options = values
        source, path = sources.find_dataset(data), sources.new_run((name or "").strip())
        start_training(source, path, _read_options(options))
        named = next(one for one in sources.runs() if local_path(one) == path)
        return note(f"{path}: started"), gr.update(choices=sources.runs(), value=named)

    @refuse_in_one_line(0)
    def end(name: str | None) -> Any:
        from unet_denoiser.app.training_process import stop_training

        path = sources.find_run(name)
        stop_training(path)
        return note(f"{path}: it finishes its step, writes a checkpoint and stops")

    @refuse_in_one_line(0)
    def go_on(name: str | None, total: str | None) -> Any:
        from unet_denoiser.app.training_process import resume_training

        path = sources.find_run(name)
        resume_training(path, parse_number("steps", (total or "").strip(), int))
        return note(f"{path}: resumed")

    timer = gr.Timer(REFRESH_SECONDS)
    gr.on([timer.tick, run.change], look, [run, seen], looked, trigger_mode="always_last", **LOOK)
    start.click(begin, fields, [message, run], **DO)
    stop.click(end, run, message, **DO)
    resume.click(go_on, [run, steps], message, **DO)


def _make_fields(sources: Sources) -> list[Any]:
    """Create the inputs of a new training."""
    names = sources.datasets()
    data = gr.Dropdown(names, value=names[:2][-1], label="Data")
    name = gr.Textbox(label="Name of the run", placeholder="digits-2")
    with gr.Row():
        steps = gr.Textbox(label="Steps", placeholder="about an hour of them", min_width=100)
        batch = gr.Textbox("32", label="Batch size", min_width=100)
    with gr.Row():
        size = gr.Textbox(label="Image size", placeholder="that of the data", min_width=100)
        rate = gr.Textbox(label="Learning rate", placeholder="by the width", min_width=100)
    every = gr.Textbox("1m", label="Previews every (steps, or a time as 10m)")
    return [data, name, steps, batch, size, rate, every]


def _read_options(values: list[Any]) -> dict[str, Any]:
    """Return the options of a new training; ValueError for one that is no number. Empty ones are None."""
    steps, batch, size, rate, every = [(value or "").strip() for value in values]
    return {
        "steps": parse_number("steps", steps, int),
        "batch_size": parse_number("batch_size", batch, int),
        "image_size": parse_number("image_size", size, int),
        "learning_rate": parse_number("learning_rate", rate, float),
        "preview_every": (int(every) if every.isdecimal() else every) or None,
    }


def _describe(found: Any) -> str:
    """Return a training's state as a line and a bar."""
    of = f" of {found.steps:,}" if found.steps else ""
    words = [f"<b>{found.status}</b>"]
    words += [f"step {found.step:,}{of}"] if found.step or found.steps else []
    if found.metrics and found.metrics[-1]["loss"] is not None:
        words.append(f"loss {found.metrics[-1]['loss']:.4f}")
    if found.seconds_left is not None:
        words.append(f"{_duration(found.seconds_left)} left")
    failed = not found.runs and found.message.startswith("unet-denoiser: error")
    if failed or found.status in ("starting", "failed"):
        words.append(escape(found.message))
    share = found.step / found.steps if found.steps else 0.0
    bar = f'<div class="ud-bar"><div style="width: {100 * share:.1f}%"></div></div>'
    kind = "ud-error" if failed or found.status == "failed" else ""
    return f'<div class="ud-state {kind}">{" · ".join(word for word in words if word)}</div>{bar}'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes}:{rest:02d} min"


def _draw(metrics: list[dict[str, Any]]) -> str:
    """Return the curves as HTML, none before the first line of metrics."""
    from unet_denoiser.training.tracking import draw_metrics

    return show_figure(draw_metrics(metrics)) if metrics else ""


def _show_previews(files: list[Path]) -> str:
    """Return the previews with their steps, the latest first."""
    latest = files[::-1][:MAX_PREVIEWS]
    return show_pictures([(file, f"step {int(file.stem.removeprefix('step-')):,}") for file in latest], PREVIEW_SIDE)


def _show_log(text: str) -> str:
    return f'<div class="ud-log">{escape(text)}</div>' if text else note("no log: this training was not started here")
