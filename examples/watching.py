"""Watch samples come about: a picture of x0 as it is predicted, step by step, then a strip and a GIF of the way.

    python examples/watching.py runs/digits

Leaves watching.png, rewritten in every step, watching-strip.png and watching.gif.
"""

import sys

from unet_denoiser import Run, TrajectoryRecorder, sample_steps, save_grid


def main(directory: str) -> None:
    run = Run.load(directory)
    film = TrajectoryRecorder(run.decode, run.picture_range)
    labels = {} if run.class_names is None else {"class_labels": run.labels(16)}
    for step in sample_steps(run.load_model(), run.process, seeds=range(16), **labels):
        film(step)
        save_grid(run.decode(step.x0), "watching.png", data_range=run.picture_range)  # whole at any moment
        print(f"t = {step.t:.0f}")
    print(film.save_strip("watching-strip.png"))
    print(film.save_gif("watching.gif"))


if __name__ == "__main__":
    main(*sys.argv[1:])
