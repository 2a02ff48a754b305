"""The reports that doctor and evaluate wrote into a run directory, as text with their pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unet_denoiser.utils.files import read_json
from unet_denoiser.utils.terminal import command


class Section(NamedTuple):
    """A report as Markdown, and its pictures with their captions."""

    text: str
    pictures: list[tuple[Path, str]]


DOCTOR_PICTURES = {
    "denoising.png": "training images, denoised from each noise level",
    "neighbours.png": "samples, above their nearest training images",
}


def read_doctor(run: Path) -> Section:
    """Return the report of `doctor`, or how to make one; ValueError for a file that is no such report."""
    file = run / "doctor" / "report.json"
    if not file.is_file():
        return Section(f"There is none yet: `{command('doctor', run)}` writes it.", [])
    report = read_json(file)
    try:
        lines = [f"**{escape_markdown(report['likely_cause'])}**", ""]
        for found in report["findings"]:
            head = f"- {found['severity']}: {found['name']}: {found['text']}"
            lines += [escape_markdown(head), f"    - {escape_markdown(found['advice'])}"]
        levels = [(f"{x['t']}", f"{x['error']:.4f}", f"{x['trivial']:.4f}") for x in report["measures"]["levels"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no report of doctor, or of another version: {error!r}") from None
    table = make_table(("noise level t", "loss", "of a trivial guess"), levels) if levels else ""
    pictures = [(file.parent / name, words) for name, words in DOCTOR_PICTURES.items()]
    return Section("\n".join([*lines, "", table]), [(path, words) for path, words in pictures if path.is_file()])


def read_evaluation(run: Path) -> Section:
    """Return the report of `evaluate`, or how to make one; ValueError for a file that is no such report."""
    file = run / "evaluation" / "report.json"
    if not file.is_file():
        return Section(f"There is none yet: `{command('evaluate', run)}` writes it.", [])
    report = read_json(file)
    try:
        text = _describe_evaluation(report)
        names = [Path(str(name)).name for name in report["pictures"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no report of evaluate, or of another version: {error!r}") from None
    words = "the samples that are closest to training images, above those"
    return Section(text, [(file.parent / name, words) for name in names if (file.parent / name).is_file()])


def _describe_evaluation(report: Mapping[str, Any]) -> str:
    about, extra = report["about"], report["samples_at_held_out_count"]
    columns = [report["samples"], *([extra] if extra else []), report["held_out"]]
    extractor, accuracy = about["extractor"], report["accuracy"]
    heads = ["", *["samples"] * (len(columns) - 1), about["held_out"]["short"]]
    rows: list[Sequence[str]] = [
        ("images / training images", *(f"{c['images']:,} / {c['reference']:,}" for c in columns)),
        (extractor["frechet_name"], *(f"{c['frechet']:.2f}" for c in columns)),
        (f"1000 x {extractor['kernel_name']}", *(_kernel(c["kernel"]) for c in columns)),
    ]
    rows += [(name, *(f"{c['overlap'][name]:.3f}" for c in columns)) for name in columns[0]["overlap"]]
    if accuracy is not None:
        shares = [f"{accuracy['samples']:.1%}", *([""] if extra else []), f"{accuracy['held_out']:.1%}"]
        rows.append(("classified as asked", *shares))
    data = about["data"]
    heading = (
        f"{report['samples']['images']:,} samples against {data['count']:,} images of {data['source']}; "
        f"{about['held_out']['words']}; features of {extractor['name']}."
    )
    copies = [
        f"- Nearest of {n['searched']:,} training images in {n['space']}: {n['median']:.3g} for samples, "
        f"{n['held_out_median']:.3g} for held-out images; {n['closer']:.1%} of the samples are nearer than 95 % of "
        f"those ({'COPIES ARE LIKELY' if n['looks_copied'] else '5 % is expected'})."
        for n in report["neighbours"]
    ]
    return "\n".join([escape_markdown(heading), "", make_table(heads, rows), "", *map(escape_markdown, copies)])


def _kernel(value: Mapping[str, float]) -> str:
    return f"{1e3 * value['value']:.3f} ± {1e3 * value['standard_error']:.3f}"


def make_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown: the first column to the left, numbers to the right."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(escape_markdown(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def escape_markdown(text: str) -> str:
    """Return a text without marks that Markdown or HTML would take for their own, but for the list's dash."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#" else letter for letter in str(text))
