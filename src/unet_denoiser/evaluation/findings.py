"""Findings of `doctor`: the meaning of its measurements in plain words, the most severe first."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from unet_denoiser.evaluation.measures import Measures
from unet_denoiser.utils.terminal import command

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
YOUNG = "young training"
YOUNG_SHARE, YOUNG_STEPS = 0.1, 500  # of the planned steps; steps
FALLING = -0.03  # a loss that changes by more from the third to the last quarter of a training still falls


class Finding(NamedTuple):
    """Something about a run that its owner should know."""

    severity: Severity  # an "error" spoils samples, a "warning" may, a "note" is worth knowing
    name: str  # short, for programs
    text: str  # the evidence
    advice: str
    is_symptom: bool = False  # it tells how samples look, not why


def find_problems(measures: Measures) -> list[Finding]:
    """List all findings, the most severe first; of equal ones causes before symptoms."""
    checks = (
        *(_check_data, _check_schedule, _check_youth, _check_noise_levels, _check_averages),
        *(_check_length, _check_loss_curve, _check_neighbours, _check_samples),
    )
    findings = [finding for check in checks for finding in check(measures)]
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), finding.is_symptom))


def likely_cause(findings: list[Finding]) -> str:
    """Say in one sentence how the samples look, and name the most severe finding that may explain it."""
    symptoms = [f.name for f in findings if f.is_symptom and f.severity != "note"]
    causes = [f for f in findings if not f.is_symptom and f.severity != "note"]
    if causes and causes[0].name == YOUNG:
        return f"{causes[0].text}, so its samples are blots or noise as yet. {causes[0].advice}."
    if not symptoms and not causes:
        return "Nothing wrong was found."
    if not symptoms:
        return f"Contrast, grain and colours of the samples are like the data's; but look at: {causes[0].name}."
    seen = f"The samples are {' and '.join(symptoms)}"
    return f"{seen}; the likely cause: {causes[0].name}." if causes else f"{seen}; no cause was found."


def _check_data(m: Measures) -> Iterator[Finding]:
    data, bounds = m.data, m.data_range
    found, expected = f"[{data.min:.3g}, {data.max:.3g}]", bounds and f"[{bounds[0]:g}, {bounds[1]:g}]"
    if data.std < 1e-3:
        text = f"the images hardly differ: standard deviation {data.std:.2g}"
        yield Finding("error", "constant data", text, "look at what the dataset returns")
    elif bounds is None:
        if not 0.5 <= data.std <= 2:
            text = f"the data have a standard deviation of {data.std:.2g}, and the noise has 1"
            yield Finding("warning", "data scale", text, "multiply the data (latents) so that it becomes about 1")
    elif data.min < bounds[0] - 1e-3 or data.max > bounds[1] + 1e-3:
        text = f"the images lie in {found}, but the process expects {expected} and clips to it"
        yield Finding("error", "data range", text, "scale the images into that range and train anew")
    elif data.min >= (middle := sum(bounds) / 2) - 0.05 * bounds[1] or data.max <= middle:
        text = f"the images lie in {found}, in one half of the {expected} that the process expects"
        yield Finding("error", "data range", text, "scale them to fill the range (2 x - 1 for [0, 1]) and train anew")
    elif data.max - data.min < 0.4 * (bounds[1] - bounds[0]):
        text = f"the images use {found} of the {expected} that the process expects"
        yield Finding("warning", "data range", text, "scale them to fill the range")


def _check_schedule(m: Measures) -> Iterator[Finding]:
    if m.signal_at_end > 0.03:
        share = f"{m.signal_at_end:.0%} of the image"
        text = f"the last timestep still has {share} in it, but sampling starts from pure noise"
        advice = "rescale_betas_zero_snr=True with v_prediction, or a larger beta_end, or 'squaredcos_cap_v2'"
        advice += "; with path='edm' a larger sigma_max"
        yield Finding("error" if m.signal_at_end > 0.2 else "warning", "schedule end", text, advice)


def _check_youth(m: Measures) -> Iterator[Finding]:
    t = m.training
    if t.step is None or t.step >= t.steps or t.step >= max(YOUNG_STEPS, YOUNG_SHARE * t.steps):
        return
    text = f"At step {t.step:,} of {t.steps:,} training has hardly begun"
    if (share := _typical_ratio(m)) is not None:
        text += f" (the network's error is {share:.0%} of a trivial guess's)"
    advice = f"Go on with: unet-denoiser train --resume {m.run}; {m.run}/samples and {m.run}/loss.png show the progress"
    yield Finding("error", YOUNG, text, advice)


def _typical_ratio(m: Measures) -> float | None:
    """Return the median over noise levels of the network's error over a trivial guess's; None without a network."""
    # where hardly any signal is left, the best network is no better than a trivial guess
    ratios = sorted(level.ratio for level in m.levels if level.signal > 0.1) or [x.ratio for x in m.levels[:1]]
    return ratios[len(ratios) // 2] if ratios else None


def _check_noise_levels(m: Measures) -> Iterator[Finding]:
    if (typical := _typical_ratio(m)) is None:
        return
    step, steps = m.training.step, m.training.steps
    advice = "look at data and learning rate; train longer"
    if step is not None and step < max(2000, steps):
        advice = f"train longer (now step {step} of {steps})"
    if typical > 0.9:
        text = f"the network is hardly better than no network: {typical:.0%} of the loss of a trivial guess"
        yield Finding("error", "undertrained", text, advice)
    elif typical > 0.6:
        text = f"the network has learned little yet: {typical:.0%} of the loss of a trivial guess"
        yield Finding("warning", "undertrained", text, advice)
    # where almost all is noise, even a tiny error in it exceeds a trivial guess's; clipping corrects those
    elif worse := [level.t for level in m.levels if level.ratio > 1.3 and level.error > 0.01]:
        is_noisy = sum(worse) / len(worse) > m.timesteps / 2
        where = "layout and brightness are decided" if is_noisy else "fine detail and grain are decided"
        text = f"the loss is above that of a trivial guess at t = {', '.join(map(str, worse))}, where {where}"
        yield Finding("warning", "bad at some noise levels", text, advice)


def _check_averages(m: Measures) -> Iterator[Finding]:
    start, lag = m.ema.share_of_start, m.ema.averaged_over_raw
    advice = f"train longer, or with a lower ema_decay than {m.ema.decay:g}"
    if lag is not None and lag > 1.1:
        text = f"the averaged weights, which samples come from, lag: {lag:.2f} times the loss of the latest weights"
        yield Finding("error" if lag > 1.5 else "warning", "averages too young", text, advice)
    elif start is not None and start > 0.05:
        text = f"the averaged weights still hold {start:.0%} of the random start, after {m.training.step} steps"
        yield Finding("error", "averages too young", text, advice)


def _check_length(m: Measures) -> Iterator[Finding]:
    t = m.training
    if t.step is not None and t.step < t.steps:
        text = f"training is at step {t.step} of {t.steps}"
        text += f" ({t.epochs:.1f} times through the data)" if t.epochs else ""
        yield Finding("note", "not finished", text, f"go on with: {command('train', '--resume', m.run)}")
    if t.epochs and t.epochs > 200 and t.images < 500:
        text = f"only {t.images} images, each seen {t.epochs:.0f} times: enough to learn them by heart"
        advice = "more images, horizontal flips, dropout, a smaller network or fewer steps"
        has_copies = m.neighbours is not None and m.neighbours.copies_are_likely
        yield Finding("warning" if has_copies else "note", "few images", text, advice)


def _check_loss_curve(m: Measures) -> Iterator[Finding]:
    if m.curve.not_finite:
        text = f"the loss was not a finite number in {m.curve.not_finite} of the logged steps"
        yield Finding("warning", "bad steps", text, "a lower learning_rate, or look for broken images")
    change = m.curve.change
    if change is not None and change > 0.1:
        text = f"the loss rises: {change:+.0%} from the third to the last quarter of the training"
        yield Finding("warning", "rising loss", text, "a lower learning_rate")
    elif change is not None and change < FALLING:
        text = f"the loss still falls ({change:+.0%} from the third to the last quarter)"
        steps = max(m.training.steps, 2 * (m.training.step or 0))
        advice = f"train longer: unet-denoiser train --resume {m.run} --steps {steps}"
        yield Finding("warning", "still learning", text, advice)
    elif change is not None and change > -0.01:
        text = f"the loss has stopped falling ({change:+.1%} from the third to the last quarter)"
        yield Finding("note", "plateau", text, "more steps will change little; a larger network or more images may")


def _check_neighbours(m: Measures) -> Iterator[Finding]:
    n = m.neighbours
    if n is None:
        return
    if n.copies_are_likely:
        text = (
            f"{n.closer:.0%} of the samples are nearer to a training image than 95 % of those are to each other, where "
            f"5 % is expected (medians {n.median:.3g} and {n.held_out_median:.3g}, root mean square, of {n.searched} "
            "images)"
        )
        if _is_grey(m):  # the mean of all images is nearer to each of them than they are to each other
            yield Finding("note", "copies", text, "grey images are near to many: see doctor/neighbours.png", True)
        else:
            advice = "see doctor/neighbours.png; more images, fewer steps, dropout"
            yield Finding("error", "copies", text, advice, True)
    elif n.ratio is not None and n.ratio > 1.5 and n.median > 0.3 * m.data.std:
        text = f"samples lie {n.ratio:.1f} times as far from the training images as those from each other"
        yield Finding("warning", "unlike the data", text, "see doctor/neighbours.png", True)


def _is_grey(m: Measures) -> bool:
    return m.samples is not None and m.samples.std < 0.6 * m.data.std


def _check_samples(m: Measures) -> Iterator[Finding]:
    s, d = m.samples, m.data
    if s is None:
        return
    if not s.finite:
        yield Finding("error", "not numbers", "samples have values that are not finite", "see the findings above", True)
        return
    if _is_grey(m):
        text = f"their standard deviation is {s.std:.2g}, that of the data {d.std:.2g}"
        yield Finding("error" if s.std < 0.4 * d.std else "warning", "grey", text, "see the causes above", True)
    if s.roughness > max(1.5 * d.roughness, d.roughness + 0.1):
        share = f"{s.roughness:.0%} of what unrelated ones would, in the data by {d.roughness:.0%}"
        severity: Severity = "error" if s.roughness > 0.7 > d.roughness else "warning"
        yield Finding(severity, "noisy", f"neighbouring pixels differ by {share}", "see the causes above", True)
    if s.saturated > d.saturated + 0.25:
        text = f"{s.saturated:.0%} of their values are at the ends of the range, of the data's {d.saturated:.0%}"
        yield Finding("warning", "oversaturated", text, "a lower guidance_scale; else see the causes above", True)
    shift = max(abs(a - b) for a, b in zip(s.mean, d.mean, strict=True))
    if shift > 0.35 * d.std + 3 * s.mean_error:
        text = f"their mean is {_join(s.mean)}, that of the data {_join(d.mean)}"
        yield Finding("warning", "off in brightness or colour", text, "see the causes above", True)


def _join(values: list[float]) -> str:
    return ", ".join(f"{v:.2f}" for v in values[:4]) + (", ..." if len(values) > 4 else "")
