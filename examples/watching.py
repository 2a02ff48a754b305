"""Watch the predicted x0 of samples step by step, then save their trajectory as a strip and as a GIF.

    python examples/watching.py runs/digits

Writes watching.png, replaced in every step, watching-strip.png and watching.gif.
"""

import sys

from unet_denoiser import Run, TrajectoryRecorder, sample_steps, save_grid


def main(directory: str) -> None:
    pipeline = Run.load(directory).load_pipeline()
    recorder = TrajectoryRecorder(pipeline.decode, pipeline.image_range)
    labels = {} if pipeline.class_names is None else {"class_labels": pipeline.labels(16)}
    for step in sample_steps(pipeline.model, pipeline.process, seeds=range(16), **labels):
        recorder(step)
        save_grid(pipeline.decode(step.x0), "watching.png", data_range=pipeline.image_range)
        print(f"t = {step.t:.0f}")
    print(recorder.save_strip("watching-strip.png"))
    print(recorder.save_gif("watching.gif"))


if __name__ == "__main__":
    main(*sys.argv[1:])
