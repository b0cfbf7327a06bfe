"""Whether a clip is what its caption says, measured in the picture and the sound alone: no model takes part.

`look` measures frames, `listen` a waveform, `judge` compares both with a toy of the little world. What cannot be seen
or heard is None, which is never right.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from scripts.tiny.listen import Heard, listen
from scripts.tiny.look import Seen, look
from scripts.tiny.world import Toy, pitch_hz

Frames = UInt8[np.ndarray, "frames height width 3"]

# How far sound may be out of step: what people notice, 45 ms early or 125 ms late. Source: ITU-R BT.1359-1.
_EARLY_MS, _LATE_MS = -45.0, 125.0
_CORRELATION = 0.8  # of pitch with height, where the height changes
_SEMITONES = 5.0  # by which a pitch may miss a height that does not change: a fifth of the picture


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which words of a caption a clip bears out, and whether its sound is in step with its own picture."""

    shape: bool
    colour: bool
    size: bool
    motion: bool
    background: bool
    sound: bool  # the kind, and of a chord the colour
    in_step: bool | None  # None for a chord, and where nothing can be compared
    offset_ms: float | None  # by which clicks come after the bounces: the median
    pitch_correlation: float | None  # of the tone with the height, where that changes
    pitch_error_semitones: float | None  # of the tone against the height: the median
    seen: Seen
    heard: Heard

    @property
    def right(self) -> bool:
        """Whether every word is borne out."""
        return self.shape and self.colour and self.size and self.motion and self.background and self.sound


def judge(
    frames: Frames, fps: float, waveform: Float[np.ndarray, "samples channels"], sample_rate_hz: int, toy: Toy
) -> Verdict:
    """Measures a clip and compares it with what the toy's caption says."""
    return compare(look(frames, fps), fps, listen(waveform, sample_rate_hz), toy)


def compare(seen: Seen, fps: float, heard: Heard, toy: Toy) -> Verdict:
    """Compares what was measured in a clip with what the toy's caption says."""
    offset = correlation = error = in_step = None
    if heard.sound == "click" and seen.contacts and heard.clicks:
        offsets = _offsets_ms(seen, fps, heard)
        offset = float(np.median(offsets))
        in_step = bool(np.all((offsets >= _EARLY_MS) & (offsets <= _LATE_MS)))
    elif heard.sound == "tone":
        correlation, error = _tone_against_height(seen, heard, fps)
        if correlation is not None:
            in_step = correlation >= _CORRELATION
        elif error is not None:
            in_step = error <= _SEMITONES
    words = {name: getattr(seen, name) == getattr(toy, name) for name in ("shape", "colour", "size", "motion")}
    return Verdict(
        **words,
        background=seen.background == toy.background,
        sound=heard.sound == toy.sound and (heard.sound != "chord" or heard.chord == toy.colour),
        in_step=in_step,
        offset_ms=offset,
        pitch_correlation=correlation,
        pitch_error_semitones=error,
        seen=seen,
        heard=heard,
    )


def _offsets_ms(seen: Seen, fps: float, heard: Heard) -> Float[np.ndarray, " offsets"]:
    """From each contact to the click nearest to it, and to each click from the nearest contact.

    Clicks in the first and last frames are left out: contacts are not found there.
    """
    gaps = 1000 * (np.array(heard.clicks) - np.array(seen.contacts)[:, None])
    of_contacts = np.take_along_axis(gaps, np.abs(gaps).argmin(axis=1)[:, None], axis=1)[:, 0]
    of_clicks = np.take_along_axis(gaps, np.abs(gaps).argmin(axis=0)[None], axis=0)[0]
    inner = [3 <= click * fps <= len(seen.heights) - 4 for click in heard.clicks]
    return np.concatenate([of_contacts, of_clicks[inner]])


def _tone_against_height(seen: Seen, heard: Heard, fps: float) -> tuple[float | None, float | None]:
    """Correlation with the height, None where that hardly changes, and the median error in semitones."""
    pitches, heights = np.array(heard.pitches_hz), np.array(seen.heights)
    heights = np.interp(heard.times, np.arange(len(heights)) / fps, heights)
    known = np.isfinite(pitches) & np.isfinite(heights)
    if known.sum() < 3:
        return None, None
    pitches, heights = 12 * np.log2(pitches[known]), heights[known]
    error = float(np.median(np.abs(pitches - 12 * np.log2(pitch_hz(heights)))))
    if np.ptp(heights) < 0.4 or np.ptp(pitches) == 0:
        return None, error
    return float(np.corrcoef(pitches, heights)[0, 1]), error
