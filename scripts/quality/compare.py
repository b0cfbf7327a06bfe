"""A checkpoint against another of the same model, from the same noise: what fewer bits change.

It needs no little world: prompts, sizes and checkpoints may be any.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from ltx_jax.clip import Clip
from ltx_jax.denoise import Pair
from ltx_jax.pipeline import Pipeline
from ltx_jax.sampling import Predict, Sigmas, euler
from scripts.quality.measures import mel_distance_db, psnr_db, ssim


@dataclass(frozen=True, kw_only=True)
class Path:
    """The reference's own walk: its tokens before every step, and its estimates there."""

    sigmas: tuple[float, ...]
    tokens: tuple[Pair, ...]
    estimates: tuple[Pair, ...]
    clip: Clip


def walk(pipe: Pipeline, **request: Any) -> Path:
    """A clip, and how it came about."""
    tokens, estimates, sigmas = [], [], []

    def watched(predict: Predict, start: Pair, levels: Sigmas) -> Pair:
        def told(step: int, sigma: float, now: Pair) -> Pair:
            estimate = predict(step, sigma, now)
            tokens.append(jax.device_get(now))
            estimates.append(jax.device_get(estimate))
            sigmas.append(float(sigma))
            return estimate

        return euler(told, start, levels)

    clip = pipe(**request, sampler=watched)
    return Path(sigmas=tuple(sigmas), tokens=tuple(tokens), estimates=tuple(estimates), clip=clip)


def teacher_forced(pipe: Pipeline, path: Path, **request: Any) -> list[float]:
    """Relative error of the velocity at every step of the reference's walk, both streams together."""
    errors: list[float] = []

    def forced(predict: Predict, start: Pair, levels: Sigmas) -> Pair:
        for step, (sigma, tokens, known) in enumerate(zip(path.sigmas, path.tokens, path.estimates, strict=True)):
            estimate = predict(step, sigma, jax.device_put(tokens))
            # Velocities are (tokens - estimate) / sigma: sigma is in both, and falls out.
            wrong = sum(map(_distance, estimate, known))
            whole = sum(map(_distance, tokens, known))
            errors.append(float(np.sqrt(wrong / whole)))
        return jax.device_put(path.estimates[-1])

    pipe(**request, sampler=forced)
    return errors


def _distance(x: Any, y: Any) -> float:
    """The sum of squared differences; none of a stream that is not there."""
    return 0.0 if x is None else float(np.sum(np.square(np.asarray(x, np.float64) - np.asarray(y, np.float64))))


class Comparison(NamedTuple):
    """What became of the requests."""

    rows: dict[str, dict[str, float]]  # means over the requests, by checkpoint
    shown: dict[str, Clip]  # clips of the first request, the reference's first


def compare(
    reference: Pipeline, others: dict[str, Pipeline], requests: Sequence[dict[str, Any]], advance: Callable[[], None]
) -> Comparison:
    """Makes every request with the reference and with each of the other checkpoints."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in others}
    shown: dict[str, Clip] = {}
    for request in requests:
        path = walk(reference, **request)
        shown.setdefault("reference", path.clip)
        for name, pipe in others.items():
            forced = teacher_forced(pipe, path, **request)
            clip = pipe(**request)
            shown.setdefault(name, clip)
            assert clip.latents is not None
            assert path.clip.latents is not None
            pair = [(clip.latents.video, path.clip.latents.video), (clip.latents.audio, path.clip.latents.audio)]
            moved, whole = sum(_distance(*each) for each in pair), sum(_distance(right, 0.0) for _, right in pair)
            rows[name].append(
                {
                    "velocity, first step": forced[0],
                    "velocity, all steps": float(np.mean(forced)),
                    "latents at the end": float(np.sqrt(moved / whole)),
                    "SSIM": ssim(clip.frames, path.clip.frames),
                    "PSNR dB": psnr_db(clip.frames, path.clip.frames),
                    "mel dB": mel_distance_db(
                        clip.waveform, path.clip.waveform, clip.sample_rate_hz, reference.configs.audio_vae
                    ),
                }
            )
            advance()
    means = {name: {key: float(np.mean([row[key] for row in made])) for key in made[0]} for name, made in rows.items()}
    return Comparison(means, shown)
