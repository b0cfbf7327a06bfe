"""What a waveform sounds like, measured: clicks and when, which chord, or a tone and its pitch over time."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import ndimage, signal

from scripts.tiny.world import CHORDS, PARTIALS

Samples = Float[np.ndarray, " samples"]
Moments = Float[np.ndarray, " moments"]

_SILENCE = 0.005  # rms
_HIGH_HZ = 2000.0  # above all tones and chords
_CLICK_SHARE = 0.3  # of a clicking clip's energy that is high; tones and chords have next to none
_CHORD_SHARE, _PARTIAL_SHARE = 0.6, 0.06  # of the energy, in a chord's three partials and in each of them
_TONE_SHARE = 0.6  # of the energy of a moment, near one pitch
_PITCHES_HZ = 150.0, 1500.0


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a waveform sounds like."""

    sound: str | None
    rms: float
    clicks: tuple[float, ...]  # seconds of their onsets
    chord: str | None  # the colour that has this chord
    chord_share: float  # of the energy
    tone_share: float
    times: tuple[float, ...]  # seconds of the pitches
    pitches_hz: tuple[float, ...]  # NaN where it is too quiet


def listen(waveform: Float[np.ndarray, "samples channels"], sample_rate_hz: int) -> Heard:
    """Measures clicks, a chord or a tone, whichever the waveform has."""
    mono = waveform.mean(axis=1, dtype=np.float64)
    rms = float(np.sqrt(np.mean(mono**2)))
    high = signal.sosfiltfilt(signal.butter(4, _HIGH_HZ, "highpass", fs=sample_rate_hz, output="sos"), mono)
    high_share = float(np.sum(high**2) / max(np.sum(mono**2), 1e-12))
    chord, chord_share = _chord(mono, sample_rate_hz)
    times, pitches, tone_share = _pitches(mono, sample_rate_hz)
    clicks: tuple[float, ...] = ()
    kind = None
    if rms >= _SILENCE:
        if high_share >= _CLICK_SHARE:
            clicks = _onsets(high, sample_rate_hz)
            kind = "click" if clicks else None
        elif chord is not None:
            kind = "chord"
        elif tone_share >= _TONE_SHARE:
            kind = "tone"
    return Heard(
        sound=kind, rms=rms, clicks=clicks, chord=chord, chord_share=chord_share, tone_share=tone_share,
        times=tuple(times.tolist()), pitches_hz=tuple(pitches.tolist()),
    )  # fmt: skip


def _onsets(high: Samples, sample_rate_hz: int) -> tuple[float, ...]:
    """Seconds at which bursts begin: half the height of each peak of the envelope. Empty for a noise without bursts."""
    short = max(1, round(0.003 * sample_rate_hz))
    envelope = np.sqrt(np.maximum(ndimage.uniform_filter1d(high**2, short), 0))  # a running sum may end below 0
    peaks, _ = signal.find_peaks(np.pad(envelope, 1), 0.35 * envelope.max(), distance=round(0.2 * sample_rate_hz))
    before, after = round(0.03 * sample_rate_hz), round(0.09 * sample_rate_hz)
    spans = [slice(max(0, peak - 1 - before), peak - 1 + after) for peak in peaks]
    if sum(float(np.sum(high[span] ** 2)) for span in spans) < 0.6 * float(np.sum(high**2)):
        return ()
    starts = [
        span.start + int((envelope[span.start : peak] >= envelope[peak - 1] / 2).argmax())
        for span, peak in zip(spans, peaks, strict=True)
    ]
    return tuple((start + short / 2) / sample_rate_hz for start in starts)


def _chord(mono: Samples, sample_rate_hz: int) -> tuple[str | None, float]:
    """The colour whose chord holds most of the energy, and that share; None where one of its partials is missing."""
    length = min(len(mono), round(0.15 * sample_rate_hz))
    frequencies, power = signal.welch(mono, sample_rate_hz, nperseg=length, nfft=4 * length)
    total = max(float(power.sum()), 1e-12)
    best, best_share = None, 0.0
    for colour, root in CHORDS.items():
        near = [np.abs(np.log2(np.maximum(frequencies, 1) / (root * partial))) < 1 / 12 for partial in PARTIALS]
        shares = [float(power[of_partial].sum()) / total for of_partial in near]
        if min(shares) >= _PARTIAL_SHARE and sum(shares) > best_share:
            best, best_share = colour, sum(shares)
    return (best if best_share >= _CHORD_SHARE else None), best_share


def _pitches(mono: Samples, sample_rate_hz: int) -> tuple[Moments, Moments, float]:
    """Seconds and Hz of the strongest frequency of each moment, and the share of the energy that lies near it."""
    length, hop = round(0.04 * sample_rate_hz), round(0.01 * sample_rate_hz)
    frequencies, times, power = signal.spectrogram(
        mono, sample_rate_hz, "hann", nperseg=length, noverlap=length - hop, nfft=4 * length
    )
    sought = (frequencies >= _PITCHES_HZ[0]) & (frequencies <= _PITCHES_HZ[1])
    pitches = frequencies[sought][power[sought].argmax(axis=0)]
    near = np.abs(frequencies[:, None] - pitches) <= np.maximum(0.2 * pitches, 1.5 * sample_rate_hz / length)
    total = power.sum(axis=0)
    share = float((power * near).sum() / max(total.sum(), 1e-12))
    return times, np.where(total >= 0.05 * total.max(), pitches, np.nan), share
