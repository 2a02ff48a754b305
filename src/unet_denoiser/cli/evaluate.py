"""unet-denoiser evaluate: metrics of samples, and a search for copies."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import OptionalName, OptionalNumber, OptionalPath, SamplingOptions
from unet_denoiser.config.base import DeviceName
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.utils.terminal import printable

CPU_SECONDS = 120  # for the samples, by default; half of it for the features of the data


def evaluate(
    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help_behavior_hint="")] = None,
    *,
    data: OptionalName = None,
    held_out: OptionalName = None,
    held_out_split: OptionalName = None,
    samples: OptionalPath = None,
    num_samples: OptionalNumber = None,
    num_data: OptionalNumber = None,
    extractor: str = "auto",
    allow_few: bool = False,
    sampling: SamplingOptions = {},  # noqa: B006
    seed: OptionalNumber = None,
    batch_size: OptionalNumber = None,
    checkpoint: OptionalName = None,
    device: DeviceName = "auto",
    out: OptionalPath = None,
) -> None:
    """Measure samples of a run: distances to its data, precision, coverage, classes, and whether they are copies.

    Every figure stands beside that of held-out images, which no model can be expected to beat. Writes RUN/evaluation:
    report.json, and a picture of the samples that are closest to training images.

    Args:
        run: a run directory, or a published pipeline's folder or hub name; may be left out with --samples and --data.
        data: its training data, as for `train` (default: as trained; a pipeline needs it, with captions if it draws
            from them).
        held_out: images it was not trained on, likewise; "digits:held-out" are those of digits (default: half of the
            images of DATA that are used stand in for them).
        held_out_split: the split of DATA, where it is hf:NAME or Parquet files, that has the held-out images.
        samples: measure these instead of making samples: a folder of images or of .npz files, an .npz or an .npy,
            of any model.
        num_samples: how many samples to make (default: 10,000; on a CPU as many as it makes in about two minutes).
        num_data: how many images of DATA are used for features, in a random order; 0 takes all (default: 10,000; on a
            CPU as many as take about a minute).
        extractor: the features that are compared: "inception" (the FID's), "efficientnet-lite0", "pixels",
            "transformers:NAME" for an image encoder, or a TorchScript file; "auto" is inception where its weights can
            be had, else efficientnet-lite0.
        allow_few: go on with fewer than 2,000 --num-samples, whose figures are mostly bias and noise.
        seed: seed of the first sample (default: 0).
        batch_size: samples made at a time (default: 64).
        checkpoint: "latest", a step's number, or "best" (default: latest).
        device: "auto" takes a GPU where there is one.
        out: the folder to write (default: RUN/evaluation, NAME-evaluation here for a pipeline, or beside SAMPLES).
    """
    with one_line_errors():
        if run is None and (samples is None or data is None):
            raise ValueError("give a RUN; or --samples and --data, for samples of any other model")
        generation = {"num_samples": num_samples, "seed": seed, "batch_size": batch_size, "checkpoint": checkpoint}
        for name, value, least in (("num_data", num_data, 0), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        given: dict[str, Any] = {name: value for name, value in generation.items() if value is not None}
        if samples is not None and (useless := [*sampling, *given]):
            raise ValueError(f"{useless[0]} means nothing with --samples, which are made already; leave it out")
        if out is not None and out.is_file():
            raise ValueError(f"out={out} is a file; give a folder")
        SamplingConfig(**sampling)  # refuses what cannot work before anything is loaded
        print(f"evaluating {run or samples} ...", flush=True)  # the imports alone take seconds
        from unet_denoiser.evaluation import samples as sample_sources
        from unet_denoiser.evaluation.evaluator import MIN_SAMPLES, check_count
        from unet_denoiser.evaluation.evaluator import evaluate as evaluate_samples
        from unet_denoiser.evaluation.feature_extractors import load_extractor
        from unet_denoiser.sampling.pipeline.pipeline import Pipeline
        from unet_denoiser.training.pipelines import load_pipeline
        from unet_denoiser.training.run import Run
        from unet_denoiser.utils.device import keep_freed_memory, resolve_device
        from unet_denoiser.utils.files import check_writable

        keep_freed_memory()
        if samples is None and num_samples is not None:
            check_count(given.pop("num_samples"), allow_few)
        resolved = resolve_device(device)
        loaded: Run | Pipeline | None = None if run is None else Run.find(run)
        folder = out or _default_folder(run, samples, loaded is not None)
        check_writable(folder)
        if run is not None and loaded is None:
            loaded = load_pipeline(run, resolved, checkpoint=checkpoint or "latest")
        data_config, images, unseen = sample_sources.load_compared_data(loaded, data, held_out, held_out_split)
        source: Any
        if samples is not None:
            source, about = sample_sources.read_samples(samples, images), {"source": str(samples)}
        else:
            assert loaded is not None
            conditioned = sample_sources.load_conditioned_data(data_config, images)
            options = {"config": loaded.sampling_config(**sampling), "device": resolved, **given}
            if num_samples is None:
                num_samples, allow_few = 10_000, True
                if resolved == "cpu":
                    num_samples = sample_sources.affordable_samples(loaded, conditioned, CPU_SECONDS, **options)
                    few = "; fewer than 2,000 are biased: compare them with the held-out column only"
                    said = f"{num_samples:,} samples, about two minutes' work here (--num-samples changes it)"
                    print(said + few * (num_samples < MIN_SAMPLES), flush=True)
            source = sample_sources.GeneratedSamples(loaded, conditioned, num_samples, **options)
            about = source.about
        encoder = load_extractor(extractor, resolved)
        if num_data is None:
            on_cpu = resolved == "cpu"
            num_data = sample_sources.affordable_images(encoder, images, CPU_SECONDS / 2) if on_cpu else 10_000
            if num_data < len(images):
                print(f"features of {num_data:,} of {len(images):,} images; --num-data changes it", flush=True)
        report = evaluate_samples(
            source,
            images,
            held_out=unseen,
            extractor=encoder,
            num_data=num_data,
            allow_few=allow_few,
            device=resolved,
            folder=folder,
            about=about,
        )
    print(report.text())
    print(printable(folder / "report.json"))


def _default_folder(run: Path | None, samples: Path | None, is_run: bool) -> Path:
    if run is not None:
        return run / "evaluation" if is_run else Path(f"{run.resolve().stem}-evaluation")
    assert samples is not None
    samples = samples.resolve()
    return samples.with_name(f"{samples.stem}-evaluation")
