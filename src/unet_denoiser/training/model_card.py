"""The card of a shared network: README.md with the hub's front matter, a picture, the data, figures and code."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from unet_denoiser.config.base import PathName
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.training.checkpoints import read_metadata
from unet_denoiser.training.diffusers_copy import EXAMPLE_CAPTION, DiffusersCopy, public_name
from unet_denoiser.training.run import Run
from unet_denoiser.utils.files import read_json, write_atomically
from unet_denoiser.utils.terminal import command

PATH_WORDS: dict[PathName, str] = {"vp": "diffusion", "flow": "flow matching", "edm": "EDM"}
SHOWN_CLASSES = 20
OVERLAPS = ("precision", "recall", "density", "coverage")


class Picture(NamedTuple):
    """The picture of a card: words about it, number of images, their classes, and the guidance; 0 images if copied."""

    words: str
    images: int
    classes: tuple[str, ...] = ()
    guidance_scale: float = 1.0


class Progress(NamedTuple):
    """The steps of a training, and the number of its images; None where no checkpoint tells."""

    step: int | None
    items: int | None


class Card(NamedTuple):
    """The contents of a card.

    Args:
        name: of the folder or hub repository, as code has it.
        picture: None if there is none.
        copy, lacks: what diffusers holds of the network, or why it does not.
        figures: contents of report.json of `evaluate`; None if there is none.
    """

    name: str
    licence: str
    run: Run
    pipeline: Pipeline
    progress: Progress
    picture: Picture | None
    copy: DiffusersCopy | None
    lacks: str | None
    figures: dict[str, Any] | None


def read_progress(run: Run) -> Progress:
    """Read what the newest checkpoint tells of the training and its data."""
    if not (paths := run.checkpoints.paths()):
        return Progress(None, None)
    metadata = read_metadata(paths[-1])
    return Progress(metadata.get("step"), metadata.get("data", {}).get("items"))


def read_figures(run: Run) -> dict[str, Any] | None:
    """Read RUN/evaluation/report.json; ValueError for a file that `evaluate` did not write."""
    path = run.path / "evaluation" / "report.json"
    if not path.is_file():
        return None
    figures = read_json(path)
    try:
        _list_figures(figures)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report of evaluate ({error}); delete it, or evaluate again") from None
    return figures


def write_card(card: Card, path: Path) -> None:
    """Write the card as a file."""
    sections = [_front_matter(card), f"# {Path(card.name).name}", _introduction(card), _show_picture(card)]
    sections += [_describe_data(card), _show_figures(card), _explain_sampling(card), _explain_diffusers(card)]
    text = "\n\n".join(section for section in sections if section) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _front_matter(card: Card) -> str:
    from huggingface_hub import ModelCardData

    config, source = card.pipeline.model.config, card.run.data.source
    task = "text-to-image" if config.context_dim else "unconditional-image-generation"
    data = ModelCardData(
        license=card.licence,
        library_name="unet-denoiser",
        pipeline_tag=("image-to-image" if card.run.data.concat else task) if config.dims == 2 else None,
        datasets=[source.removeprefix("hf:").split(":")[0]] if source.startswith("hf:") else None,
        tags=["diffusion", "unet-denoiser", *([] if card.copy is None else ["diffusers"])],
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(card: Card) -> str:
    run, config, training = card.run, card.pipeline.model.config, card.run.training
    kind, size = PATH_WORDS[run.process.path], _size(card)
    given = [name for name, has in (("classes", config.num_classes), ("captions", config.context_dim)) if has]
    given += [f"{config.vector_dim} numbers"] if config.vector_dim else []
    given += ["an image"] if run.data.concat else []
    conditions = f", given {' and '.join(given)}" if given else ""
    parameters = sum(p.numel() for p in card.pipeline.model.parameters())
    trained = "" if card.progress.step is None else f", trained for {card.progress.step:,} steps"
    batches = f" in batches of {training.batch_size * training.gradient_accumulation_steps:,}" if trained else ""
    lines = [
        f"A {kind} model of {size} images{conditions}.",
        f"It is a U-Net of {parameters:,} parameters{trained}{batches}.",
    ]
    if training.lora_rank:
        lines.append(f"A LoRA of rank {training.lora_rank} was trained; it is merged into the weights.")
    if run.process.distillation is not None:
        told = run.process.distillation.describe()
        lines.append(f"{told[:1].upper()}{told[1:]}: sampling takes these and no others.")
    return "\n".join(lines)


def _size(card: Card) -> str:
    size = card.pipeline.data.image_size
    sizes = size if isinstance(size, tuple) else card.pipeline.model.config.sizes
    return "x".join(map(str, sizes))


def _show_picture(card: Card) -> str:
    if card.picture is None:
        return ""
    return f"![Samples](samples.png)\n\n{card.picture.words}"


def _describe_data(card: Card) -> str:
    data, config = card.run.data, card.pipeline.model.config
    local = not data.source.startswith("hf:")
    rows = [("source", Path(data.source).name if local else data.source.removeprefix("hf:"))]
    if card.progress.items is not None:
        rows.append(("images", f"{card.progress.items:,}"))
    rows += [("size", _size(card)), ("channels", str(data.channels or card.pipeline.image_channels))]
    if names := card.pipeline.class_names:
        more = f", and {len(names) - SHOWN_CLASSES:,} more" if len(names) > SHOWN_CLASSES else ""
        rows.append(("classes", f"{len(names):,}: {', '.join(names[:SHOWN_CLASSES])}{more}"))
    if data.text_encoder is not None:
        rows.append(("captions", f"encoded by {public_name(data.text_encoder)}"))
    if config.vector_dim is not None:
        rows.append(("numbers", ", ".join(data.vector_columns) or f"{config.vector_dim}, without names"))
    if data.concat is not None:
        rows.append(("second image", public_name(data.concat)))
    if data.vae is not None:
        latents = "x".join(map(str, config.sizes))
        rows.append(("latents", f"{latents} with {config.out_channels} channels, by {public_name(data.vae)}"))
    if data.horizontal_flip:
        rows.append(("augmentation", "horizontal flips"))
    table = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["## The data", "", "| | |", "|---|---|", *table])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def _show_figures(card: Card) -> str:
    if card.figures is None:
        return ""
    columns, rows, words = _list_figures(card.figures)
    step = card.figures["about"]["samples"].get("step")
    if step is not None and card.progress.step not in (None, step):
        words += f" They are of step {step:,}; this is step {card.progress.step:,}."
    table = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    table += [f"| {_cell(name)} | {' | '.join(values)} |" for name, values in rows]
    return "## Figures of `unet-denoiser evaluate`\n\n" + "\n".join(table) + f"\n\n{words}"


def _list_figures(report: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]], str]:
    """Return heads, rows and a sentence of the table; KeyError or TypeError for what is no report."""
    about, sets = report["about"], [report["samples"], report["held_out"]]
    extractor, sampling = about["extractor"], about["samples"].get("sampling", {})
    kernels = [f"{1e3 * s['kernel']['value']:.3f} ± {1e3 * s['kernel']['standard_error']:.3f}" for s in sets]
    rows = [
        ("number / training images", [f"{s['images']:,} / {s['reference']:,}" for s in sets]),
        (extractor["frechet_name"], [f"{s['frechet']:.2f}" for s in sets]),
        (f"1000 x {extractor['kernel_name']}", kernels),
        *((name, [f"{s['overlap'][name]:.3f}" for s in sets]) for name in OVERLAPS),
    ]
    if (accuracy := report["accuracy"]) is not None:
        rows.append(("classified as asked", [f"{accuracy['samples']:.1%}", f"{accuracy['held_out']:.1%}"]))
    copied = [n["space"] for n in report["neighbours"] if n["looks_copied"]]
    words = f"{extractor['width']:,} features of {extractor['name']}."
    if sampling:
        steps = f"{sampling['num_inference_steps']} steps of {sampling['sampler']}"
        words += f" Sampled with {steps} and guidance of {sampling['guidance_scale']:g}."
    words += f" Copies of training images are likely ({', '.join(copied)})." if copied else " No sign of copies."
    held_out = "held-out images" if about["held_out"].get("source") else "half of the data"
    return ["samples", held_out], rows, words


def _explain_sampling(card: Card) -> str:
    pipeline, picture = card.pipeline, card.picture
    config, options, keywords = pipeline.model.config, list[str](), list[str]()
    count = picture.images if picture is not None and picture.images else 4
    scale = 1.0 if picture is None else picture.guidance_scale
    names = list(picture.classes) if picture else []
    if names and names != pipeline.class_names:
        options += ["--class", *names]
        keywords.append(f"class_labels=pipeline.labels({count}, {json.dumps(names, ensure_ascii=False)})")
    elif config.num_classes:
        keywords.append(f"class_labels=pipeline.labels({count})")
    if config.context_dim:
        options += ["--caption", EXAMPLE_CAPTION]
        keywords.append(f'**pipeline.encode_captions(["{EXAMPLE_CAPTION}"] * {count}).given()')
    if config.vector_dim:
        options += ["--vector", *["0"] * config.vector_dim]
        keywords.append(f"vector=[[0.0] * {config.vector_dim}] * {count}")
    if pipeline.data.concat is not None:
        kind = pipeline.data.concat_kind
        is_inpainting = kind is not None and kind.name == "inpainting"
        options += ["--image", "mine.png", "--mask", "mask.png"] if is_inpainting else ["--concat-image", "mine.png"]
    options += ["--guidance-scale", f"{scale:g}"] if scale != 1 else []
    out = "samples.png" if pipeline.makes_images else "samples.npy"
    line = command("sample", card.name, "--num-images", count, *options, "--out", out)
    text = f"## Sample it\n\n```bash\npip install unet-denoiser\n{line}\n```"
    if pipeline.data.concat is not None:
        return text
    chosen = f"guidance_scale={scale:g}" if scale != 1 else ""
    arguments = ", ".join([f"seeds=range({count})", "config=config", *keywords])
    code = [
        "from unet_denoiser import Pipeline, sample",
        "",
        f"pipeline = Pipeline.from_pretrained({json.dumps(card.name, ensure_ascii=False)})",
        f"config = pipeline.sampling_config({chosen})",
        f"x = sample(pipeline.model, pipeline.process, {arguments})",
        f'pipeline.save_grid(pipeline.decode(x), "{out}")',
    ]
    return text + "\n\nThe same in Python:\n\n```python\n" + "\n".join(code) + "\n```"


def _explain_diffusers(card: Card) -> str:
    if card.copy is None:
        return f"## In diffusers\n\nThere is no copy for diffusers: {card.lacks}."
    text = f"## In diffusers\n\n```python\n{card.copy.code(card.name)}\n```"
    return text if card.copy.note is None else f"{text}\n\n{card.copy.note}"
