"""Sound in and out: read as stereo, brought to a rate and a length, written as WAV."""

import warnings
import wave
from fractions import Fraction
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ltx_jax.cache import written_whole
from ltx_jax.decoding import MediaError, check_suffix, decoded_from, opened, start_seconds
from ltx_jax.mel import resample

Waveform = Float[np.ndarray, "samples channels"]

# Sample rates whose ratio has larger terms than this are rounded to one that has not, off by 1 in 8,000 at most: the
# filters of 47,999 to 48,000 Hz would take 8 GB. All common rates are exact.
_LARGEST_TERM = 4000
# A decoder fills its overlap with what came before: a window's first sound needs this much ahead of it.
_WARM_UP_SECONDS = 0.25
# Containers round timestamps, Matroska to milliseconds: sound that is this near to what came before follows on it.
_TIMESTAMP_SECONDS = 0.01


def read_audio(path: Path, *, seconds: float | None = None) -> tuple[Waveform, int]:
    """The sound of an audio file or a clip as stereo in [-1, 1], all or the first `seconds`; and its rate in hertz.

    One channel is doubled; more than two are mixed down, with a warning. Raises MediaError for a file that is not
    there, cannot be read or is damaged, and for one without sound.
    """
    if seconds is not None and seconds <= 0:
        raise MediaError(f"cannot read {seconds} s of sound; give more than 0 s")
    return sound_of(path, since=None, seconds=seconds)


def fit_audio(
    waveform: Waveform, rate: int, *, to_hz: int, channels: int = 2, seconds: float | None = None
) -> Float[np.ndarray, "new_samples new_channels"]:
    """A waveform at `rate` hertz at another rate, with one or two channels, cut or filled up with silence to `seconds`.

    Warns where the rate changes. Raises MediaError for channel counts that are neither.
    """
    found = waveform.shape[1]
    if not {found, channels} <= {1, 2}:
        raise MediaError(f"sound has one channel or two, got {found} and should make {channels}; mix it down")
    if found > channels:
        waveform = waveform.mean(axis=1, keepdims=True)
    if rate != to_hz:
        warnings.warn(f"sound of {rate} Hz is resampled to {to_hz} Hz", stacklevel=2)
        num_samples = -(-len(waveform) * to_hz // rate)
        ratio = Fraction(to_hz, rate).limit_denominator(_LARGEST_TERM)
        with jax.default_matmul_precision("highest"):  # of convolutions as well
            resampled = resample(jnp.asarray(waveform)[None], ratio.denominator, ratio.numerator)
        waveform = _of_length(np.asarray(resampled[0]), num_samples)
    if seconds is not None:
        waveform = _of_length(waveform, round(seconds * to_hz))
    return np.repeat(waveform, channels // waveform.shape[1], axis=1).astype(np.float32, copy=False)


def write_wav(path: Path, waveform: Waveform, sample_rate_hz: int) -> None:
    """Writes 16-bit PCM, whole or not at all. Raises MediaError for a name that does not end in .wav."""
    check_suffix(path, ".wav")
    levels = np.round(np.clip(waveform, -1, 1) * 32767).astype("<i2")
    with written_whole(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(waveform.shape[1])
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(levels.tobytes())


def _of_length(waveform: Waveform, num_samples: int) -> Float[np.ndarray, "new_samples channels"]:
    return np.pad(waveform[:num_samples], ((0, max(0, num_samples - len(waveform))), (0, 0)))


def sound_of(path: Path, *, since: float | None, seconds: float | None) -> tuple[Waveform, int]:
    """Stereo from `since` seconds by the file's clock on, or from its first sound; silence where there is none."""
    with opened(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path} has no audio stream; give a file with sound")
        stream = container.streams.audio[0]
        pieces: list[tuple[int, np.ndarray]] = []  # first sample, samples
        rate, end, most, total = 0, 0, 0, None
        resampler, layout = None, None
        begin = start_seconds(stream) if since is None else since
        for frame in decoded_from(container, stream, begin - _WARM_UP_SECONDS):
            if not pieces:
                rate = frame.sample_rate
                total = None if seconds is None else round(seconds * rate)
                begin = begin if since is not None or frame.time is None else frame.time
            if resampler is None or frame.layout.name != layout:
                layout, most = frame.layout.name, max(most, frame.layout.nb_channels)
                few = frame.layout.nb_channels <= 2
                resampler = av.AudioResampler(format="fltp", layout=layout if few else "stereo", rate=rate)
            position = end if frame.time is None else round((frame.time - begin) * rate)
            if pieces and abs(position - end) <= _TIMESTAMP_SECONDS * rate:
                position = end
            if total is not None and position >= total:
                break
            samples = np.concatenate([part.to_ndarray() for part in resampler.resample(frame)], axis=1).T
            pieces.append((position, np.repeat(samples, 2 // samples.shape[1], axis=1)))
            end = position + len(samples)
    if not pieces and since is None:
        raise MediaError(f"the audio stream of {path} is empty; give a file with sound")
    if not pieces:
        rate = stream.codec_context.sample_rate
        total = round((seconds or 0) * rate)
    waveform = np.zeros((end if total is None else total if since is not None else min(end, total), 2), np.float32)
    for position, samples in pieces:
        samples = samples[max(0, -position) :]  # what was decoded before the beginning
        place = waveform[max(0, position) :][: len(samples)]
        place[:] = samples[: len(place)]
    if most > 2:
        warnings.warn(f"the {most} channels of {path} are mixed down to two", stacklevel=3)
        waveform /= max(1.0, float(np.abs(waveform).max(initial=0)))  # a sum of channels can exceed full scale
    return np.clip(waveform, -1, 1), rate
