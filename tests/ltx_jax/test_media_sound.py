"""Sound in and out: levels, channels, lengths and rates, and sound that stays in step with its clip."""

import warnings
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ltx_jax.media import (
    MediaError,
    check_writable,
    describe,
    fit_audio,
    read_audio,
    read_video,
    write_mp4,
    write_wav,
)


def tone(seconds: float, rate: int, *, hertz: float = 440.0, channels: int = 2, level: float = 0.5) -> np.ndarray:
    """A sine in the first channel, half as loud in the second, and so on."""
    sine = np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate) * level
    return (sine[:, None] / np.arange(1, channels + 1)).astype(np.float32)


def chirp(seconds: float, rate: int) -> np.ndarray:
    """A rising tone: what is out of step by a sample is told from what is not."""
    t = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * (200 + 1500 * t) * t)[:, None] * [0.5, 0.25]).astype(np.float32)


def lag(ours: np.ndarray, theirs: np.ndarray) -> int:
    """By how many samples ours comes late, at most 2,000 either way."""
    size = 2 ** (len(ours) + len(theirs)).bit_length()
    spectra = np.fft.rfft(ours[:, 0], size) * np.fft.rfft(theirs[:, 0], size).conj()
    return int(np.roll(np.fft.irfft(spectra), 2000)[:4001].argmax()) - 2000


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The root mean square of the difference, by that of the sound, without the ends, where codecs ring."""
    inner = slice(len(theirs) // 8, -len(theirs) // 8)
    return float(np.linalg.norm((ours[: len(theirs)] - theirs)[inner]) / np.linalg.norm(theirs[inner]))


def encode(path: Path, waveform: np.ndarray, rate: int, codec: str, sample_format: str = "fltp") -> Path:
    layout = "stereo" if waveform.shape[1] == 2 else "mono"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in av.AudioResampler(format=sample_format, layout=layout, rate=rate).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path


def write_pcm(path: Path, waveform: np.ndarray, rate: int) -> Path:
    """A WAV of any number of channels."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(waveform.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(waveform * 32767).astype("<i2").tobytes())
    return path


def test_a_wav_is_read_as_it_was_written(tmp_path):
    waveform = tone(0.3, 22_050)
    write_wav(tmp_path / "a.wav", waveform, 22_050)
    with warnings.catch_warnings(action="error"):
        again, rate = read_audio(tmp_path / "a.wav")
    assert (again.shape, again.dtype, rate) == (waveform.shape, np.float32, 22_050)
    # Half a level of 16 bits in rounding, and full scale is 32,767 one way and 32,768 the other.
    np.testing.assert_allclose(again, waveform, atol=1.1 / 32768)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_what_is_too_loud_is_clipped_not_wrapped(tmp_path):
    write_wav(tmp_path / "a.wav", np.asarray([[2.0, -2.0], [0.0, 0.0]], np.float32), 8_000)
    again, _ = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(again, [[1, -1], [0, 0]], atol=1 / 32767)


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "rate", "tolerance"),
    [
        ("a.flac", "flac", "s16", 44_100, 1e-4),  # lossless in 16 bits
        ("a.mp3", "libmp3lame", "fltp", 44_100, 0.1),  # what the codecs lose
        ("a.m4a", "aac", "fltp", 48_000, 0.1),
        ("a.mp4", "aac", "fltp", 22_050, 0.1),
        ("a.opus", "libopus", "fltp", 48_000, 0.1),
    ],
)
def test_audio_files_are_read_in_step(tmp_path, name, codec, sample_format, rate, tolerance):
    waveform = chirp(0.5, rate)
    with warnings.catch_warnings(action="error"):
        again, found = read_audio(encode(tmp_path / name, waveform, rate, codec, sample_format))
    assert found == rate
    assert len(waveform) <= len(again) < len(waveform) + 3000  # codecs work in packets
    assert lag(again, waveform) == 0
    assert off(again, waveform) < tolerance


def test_one_channel_is_doubled_at_the_same_level(tmp_path):
    waveform = tone(0.1, 16_000, channels=1)
    again, _ = read_audio(write_pcm(tmp_path / "mono.wav", waveform, 16_000))
    np.testing.assert_allclose(again, waveform.repeat(2, axis=1), atol=1 / 32767)


@pytest.mark.parametrize("channels", [3, 4, 6, 8])
def test_more_channels_are_mixed_down_within_full_scale(tmp_path, channels):
    waveform = np.full((800, channels), 0.9, np.float32)
    path = write_pcm(tmp_path / "many.wav", waveform, 16_000)
    with pytest.warns(UserWarning, match=f"the {channels} channels of .* are mixed down to two"):
        again, _ = read_audio(path)
    assert again.shape == (800, 2)
    assert 0.4 < np.abs(again).max() <= 1


def test_only_the_first_seconds_are_read(tmp_path):
    waveform = tone(1.0, 16_000)
    write_wav(tmp_path / "a.wav", waveform, 16_000)
    again, _ = read_audio(tmp_path / "a.wav", seconds=0.25)
    np.testing.assert_allclose(again, waveform[:4000], atol=1.1 / 32768)
    assert len(read_audio(tmp_path / "a.wav", seconds=9.0)[0]) == 16_000
    with pytest.raises(MediaError, match="more than 0 s"):
        read_audio(tmp_path / "a.wav", seconds=0.0)


def test_what_has_no_sound_is_refused(tmp_path):
    with pytest.raises(MediaError, match="there is no file at"):
        read_audio(tmp_path / "missing.wav")
    with pytest.raises(MediaError, match="is a folder"):
        read_audio(tmp_path)
    (tmp_path / "text.wav").write_text("I make no sound\n" * 50)
    with pytest.raises(MediaError, match="cannot be read as video or audio"):
        read_audio(tmp_path / "text.wav")
    write_mp4(tmp_path / "silent.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=24.0)
    with pytest.raises(MediaError, match="has no audio stream"):
        read_audio(tmp_path / "silent.mp4")
    write_wav(tmp_path / "none.wav", np.zeros((0, 2), np.float32), 8_000)
    with pytest.raises(MediaError, match=r"is empty|cannot be read"):
        read_audio(tmp_path / "none.wav")


def test_a_cut_off_audio_file_is_refused(tmp_path):
    path = encode(tmp_path / "a.m4a", tone(2.0, 48_000), 48_000, "aac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"cannot be read|cut off"):
        read_audio(path)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 47_999, 96_000])
def test_another_rate_is_the_same_sound_and_is_said(rate):
    with pytest.warns(UserWarning, match=f"sound of {rate} Hz is resampled to 48000 Hz"):
        fitted = fit_audio(tone(0.5, rate), rate, to_hz=48_000)
    assert fitted.dtype == np.float32
    assert len(fitted) == -(-round(0.5 * rate) * 48_000 // rate)
    expected = np.resize(tone(0.5, 48_000), fitted.shape)
    # The ripple of a filter of six zero crossings; from 47,999 Hz, 20 millionths of speed: 0.03 rad at last.
    assert off(fitted, expected) < 0.03
    assert lag(fitted, expected) == 0


def test_channels_and_length_are_made_to_fit():
    waveform = tone(0.1, 16_000)
    with warnings.catch_warnings(action="error"):
        same = fit_audio(waveform, 16_000, to_hz=16_000)
        mono = fit_audio(waveform, 16_000, to_hz=16_000, channels=1)
        longer = fit_audio(mono, 16_000, to_hz=16_000, seconds=0.2)
        shorter = fit_audio(waveform, 16_000, to_hz=16_000, seconds=0.05)
    np.testing.assert_array_equal(same, waveform)
    np.testing.assert_array_equal(mono[:, 0], waveform.mean(axis=1))
    assert longer.shape == (3200, 2)
    np.testing.assert_array_equal(longer[:1600], mono.repeat(2, axis=1))
    assert not longer[1600:].any()
    np.testing.assert_array_equal(shorter, waveform[:800])
    with pytest.raises(MediaError, match="got 3 and should make 2"):
        fit_audio(np.zeros((10, 3), np.float32), 16_000, to_hz=16_000)


@pytest.mark.parametrize(("rate", "written"), [(44_100, 44_100), (96_000, 96_000), (37_800, 44_100), (192_000, 96_000)])
def test_a_clip_keeps_a_waveform_of_any_rate(tmp_path, rate, written):
    waveform = chirp(0.5, rate)
    path = tmp_path / "clip.mp4"
    if rate == written:
        with warnings.catch_warnings(action="error"):
            write_mp4(path, np.zeros((12, 32, 32, 3), np.uint8), fps=24.0, waveform=waveform, sample_rate_hz=rate)
    else:
        with pytest.warns(UserWarning, match=f"resampled to {written} Hz"):
            write_mp4(path, np.zeros((12, 32, 32, 3), np.uint8), fps=24.0, waveform=waveform, sample_rate_hz=rate)
    assert describe(path)["sample_rate_hz"] == written
    again = read_video(path).waveform
    assert again is not None
    assert len(again) == written // 2
    assert lag(again, chirp(0.5, written)) == 0
    assert off(again, chirp(0.5, written)) < 0.03  # what AAC loses; at its default bit rate up to 0.18


def test_sound_longer_or_shorter_than_its_clip_stays_in_step(tmp_path):
    for seconds in (0.25, 1.5):
        path = tmp_path / "clip.mp4"
        frames = np.zeros((24, 32, 32, 3), np.uint8)
        write_mp4(path, frames, fps=24.0, waveform=tone(seconds, 48_000), sample_rate_hz=48_000)
        video = read_video(path)
        assert len(video.frames) == 24
        assert video.waveform is not None
        assert len(video.waveform) == 48_000
        loud = np.flatnonzero(np.abs(video.waveform[:, 0]) > 0.1)
        assert loud[0] < 100
        # AAC rings on for at most a packet of 1,024 samples.
        assert abs(loud[-1] - min(seconds * 48_000, 48_000)) < 1100


def test_sound_does_not_drift_over_a_long_clip(tmp_path):
    """A click each second for twenty seconds, read in windows from anywhere."""
    rate, seconds = 44_100, 20
    waveform = np.zeros((rate * seconds, 2), np.float32)
    for second in range(seconds):
        waveform[second * rate + rate // 2 :][:300] = 0.8 * np.sin(np.arange(300) * 0.5)[:, None]
    path = tmp_path / "long.mp4"
    frames = np.zeros((seconds * 25, 32, 32, 3), np.uint8)
    write_mp4(path, frames, fps=25.0, waveform=waveform, sample_rate_hz=rate)
    for start in (0.0, 7.0, 13.24, 19.0):
        video = read_video(path, start=start, num_frames=25)
        assert video.waveform is not None
        first = int(np.argmax(np.abs(video.waveform[:, 0]) > 0.2))
        expected = round((0.5 - start) % 1 * rate)
        assert abs(first - expected) < rate // 2000  # half a millisecond


@pytest.mark.parametrize("channels", [1, 2])
def test_clips_have_one_channel_or_two(tmp_path, channels):
    waveform = tone(0.2, 48_000, channels=channels)
    write_mp4(tmp_path / "clip.mp4", np.zeros((5, 32, 32, 3), np.uint8), fps=24.0, waveform=waveform)
    assert describe(tmp_path / "clip.mp4")["audio_channels"] == channels
    with pytest.raises(MediaError, match="one channel or two"):
        write_mp4(
            tmp_path / "no.mp4", np.zeros((5, 32, 32, 3), np.uint8), fps=24.0, waveform=waveform.repeat(3, axis=1)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_name_says_what_is_written(tmp_path):
    with pytest.raises(MediaError, match=r"ends in \.wav"):
        write_wav(tmp_path / "a.mp3", np.zeros((8, 2), np.float32), 8_000)
    with pytest.raises(MediaError, match=r"ends in \.mp4"):
        write_mp4(tmp_path / "a.mkv", np.zeros((3, 32, 32, 3), np.uint8), fps=24.0)
    with pytest.raises(MediaError, match=r"ends in \.mp4 or \.wav"):
        check_writable(tmp_path / "a.avi", suffixes=(".mp4", ".wav"))
    check_writable(tmp_path / "A.MP4", suffixes=(".mp4", ".wav"))
    assert list(tmp_path.iterdir()) == []


def test_clips_without_frames_or_of_odd_size_are_refused(tmp_path):
    with pytest.raises(MediaError, match="no frames to write"):
        write_mp4(tmp_path / "a.mp4", np.zeros((0, 32, 32, 3), np.uint8), fps=24.0)
    with pytest.raises(MediaError, match="even sizes, got frames of 33 x 32"):
        write_mp4(tmp_path / "a.mp4", np.zeros((3, 32, 33, 3), np.uint8), fps=24.0)
    assert list(tmp_path.iterdir()) == []
