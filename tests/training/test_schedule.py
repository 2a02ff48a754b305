"""Checkpoints and previews by steps and by time, with a clock of our own."""

import pytest

from unet_denoiser import TrainingConfig
from unet_denoiser.config.training import parse_duration
from unet_denoiser.training.schedule import Schedule


def simulate(config, seconds, steps, preview_seconds=0.0):
    """Return the steps that save and those that preview, if each step takes this long."""
    now = [0.0]
    schedule, saves, previews = Schedule(config, lambda: now[0]), [], []
    for step in range(1, steps + 1):
        now[0] += seconds
        save, preview = schedule.due(step)
        saves += [step] * save
        previews += [step] * preview
        now[0] += preview_seconds * preview
        schedule.end_step(saved=save, preview_seconds=preview_seconds if preview else None)
    return saves, previews


def test_by_default_a_kill_costs_ten_minutes_at_most():
    assert simulate(TrainingConfig(), seconds=1, steps=1500)[0] == [1, 601, 1201]
    assert simulate(TrainingConfig(), seconds=240, steps=5)[0] == [1, 3, 5]  # the next step would be too late
    assert simulate(TrainingConfig(), seconds=1000, steps=3)[0] == [1, 2, 3]


def test_steps_count_as_before_and_kept_ones_are_written():
    assert simulate(TrainingConfig(checkpoint_every=4, preview_every=5, steps=10), 1e4, 10) == ([1, 4, 8, 10], [5, 10])
    assert simulate(TrainingConfig(keep_every=4, steps=10), 1, 10)[0] == [1, 4, 8, 10]


def test_previews_come_early_and_take_a_tenth_of_the_time_at_most():
    assert simulate(TrainingConfig(), seconds=1, steps=2300)[1] == [60, 180, 420, 900, 1500, 2100]
    seconds = simulate(TrainingConfig(preview_every="2m"), seconds=1, steps=2300, preview_seconds=40)[1]
    assert seconds == [60, *range(420, 2300, 360)]


def test_the_next_checkpoint_in_words():
    now = [0.0]
    by_steps = Schedule(TrainingConfig(checkpoint_every=500, steps=1100))
    assert [by_steps.next_checkpoint(step) for step in (1, 500, 1000)] == [
        "checkpoint at step 500",
        "checkpoint at step 1000",
        "checkpoint at step 1100",
    ]
    by_time = Schedule(TrainingConfig(), lambda: now[0])
    assert by_time.next_checkpoint(1) == "checkpoint in 10 min"
    now[0] = 560
    assert by_time.next_checkpoint(1) == "checkpoint in 40 s"


def test_previews_are_smaller_where_they_would_take_minutes():
    now = [0.0]
    schedule = Schedule(TrainingConfig(batch_size=8), lambda: now[0])
    assert schedule.most_samples(25) > 1000  # no step yet
    now[0] = 10.0
    schedule.due(1)
    assert schedule.most_samples(25) == 5  # 10 s / 8 / 3 an image and step


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h", 3600), ("0.5h", 1800)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", [0, -1, "", "10", "0m", "m", "10 m", "-3m", "1d", 2.5, "nan"])
def test_refuses_other_intervals(value):
    for name in ("checkpoint_every", "preview_every"):
        with pytest.raises(
            (ValueError, TypeError), match=f"{name}=.* must be a (number of steps, at least 1|whole number)"
        ):
            TrainingConfig(**{name: value})
