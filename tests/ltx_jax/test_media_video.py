"""Clips in: every frame where it belongs in time, upright, in its colours, with its sound; and what is refused.

Frames of the clips here are flat greys: frame n has level `level(n)`, far enough apart to be told after compression.
"""

import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ltx_jax.media import MediaError, probe_video, read_video, write_mp4, write_wav

RATE_HZ = 48_000


def level(number: int) -> int:
    return 20 + 9 * number


def greys(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    levels = np.asarray([level(n) for n in range(count)], np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `greys` these are."""
    return np.round((frames.mean(axis=(1, 2, 3)) - 20) / 9).astype(int).tolist()


def write(
    path: Path,
    frames: np.ndarray,
    times: list[int],
    *,
    base: int = 24,
    rate: Fraction | int | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
) -> Path:
    """Frames shown at `times / base` seconds, a key frame every four."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=rate or base, options={"g": "4", "crf": "10"} if codec == "libx264" else {}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, base)
        for image, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def clicks(seconds: list[float], length: float, rate: int = RATE_HZ) -> np.ndarray:
    """Silence with short bursts."""
    waveform = np.zeros((round(length * rate), 2), np.float32)
    for second in seconds:
        begin = round(second * rate)
        waveform[begin : begin + 480] = np.sin(np.arange(480) * 0.5)[:, None] * 0.8
    return waveform


def onset(waveform: np.ndarray) -> int:
    return int(np.argmax(np.abs(waveform[:, 0]) > 0.2))


@pytest.fixture
def clip(tmp_path) -> Path:
    """24 frames at 24 a second, with a click at 0.5 s."""
    path = tmp_path / "clip.mp4"
    write_mp4(path, greys(24), fps=24.0, waveform=clicks([0.5], 1.0), sample_rate_hz=RATE_HZ)
    return path


def test_a_whole_clip_is_read_as_it_was_written(clip):
    with warnings.catch_warnings(action="error"):
        video = read_video(clip)
    assert video.frames.shape == (24, 32, 48, 3)
    assert video.fps == 24.0
    assert numbers(video.frames) == list(range(24))
    assert video.waveform is not None
    assert video.waveform.shape == (RATE_HZ, 2)  # exactly as long as the frames, whatever AAC adds
    assert video.sample_rate_hz == RATE_HZ
    assert abs(onset(video.waveform) - RATE_HZ // 2) < 24  # the encoder's delay is taken away; half a millisecond


@pytest.mark.parametrize(
    "rgb",
    [(200, 40, 60), (30, 190, 60), (20, 30, 220), (0, 0, 0), (255, 255, 255)],
    ids=lambda rgb: "-".join(map(str, rgb)),
)
def test_colours_survive_and_are_tagged(tmp_path, rgb):
    frames = np.broadcast_to(np.asarray(rgb, np.uint8), (3, 32, 32, 3))
    write_mp4(tmp_path / "clip.mp4", frames, fps=24.0)
    # Eight-bit limited-range luma and chroma round by half of 1 / 219: less than 2 levels of each colour; and CRF 18.
    assert np.abs(read_video(tmp_path / "clip.mp4").frames.astype(int) - rgb).max() <= 4
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert next(container.decode(video=0)).colorspace == 1  # BT.709


def test_a_window_is_read_from_its_time_on(clip):
    video = read_video(clip, start=10 / 24, num_frames=7)
    assert numbers(video.frames) == list(range(10, 17))
    assert video.waveform is not None
    assert len(video.waveform) == 7 * RATE_HZ // 24
    assert abs(onset(video.waveform) - 2 * RATE_HZ // 24) < 24  # the click is on frame 12
    assert numbers(read_video(clip, start=0.5, seconds=0.25).frames) == list(range(12, 18))


def test_a_window_that_reaches_beyond_the_end_gives_what_there_is(clip):
    video = read_video(clip, start=20 / 24, num_frames=25)
    assert numbers(video.frames) == [20, 21, 22, 23]
    assert video.waveform is not None
    assert len(video.waveform) == 4 * RATE_HZ // 24


def test_a_window_behind_the_end_is_refused(clip):
    with pytest.raises(MediaError, match=r"no frame at 1\.5 s; it is 1 s long"):
        read_video(clip, start=1.5)


@pytest.mark.parametrize(
    "window",
    [{"start": -1.0}, {"fps": 0.0}, {"seconds": 1.0, "num_frames": 9}, {"seconds": 0.0}, {"num_frames": 0}],
    ids=str,
)
def test_impossible_windows_are_refused(clip, window):
    with pytest.raises(MediaError, match="window"):
        read_video(clip, **window)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (12.0, list(range(0, 24, 2))),
        (48.0, [n // 2 for n in range(48)]),  # halfway between two frames: the earlier
        (16.0, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22]),  # 1.5 steps: the earlier of two as near
    ],
)
def test_another_rate_takes_the_nearest_frames_and_says_so(clip, fps, expected):
    with pytest.warns(UserWarning, match=f"24 frames a second and is read at {fps:g}"):
        video = read_video(clip, fps=fps)
    assert numbers(video.frames) == expected
    assert video.fps == fps
    assert video.waveform is not None
    assert len(video.waveform) == round(len(expected) / fps * RATE_HZ)


def test_uneven_frames_are_placed_by_their_timestamps(tmp_path):
    # 1/24 s, then one frame of 4/24 s, then 1/24 s again.
    path = write(tmp_path / "uneven.mp4", greys(7), [0, 1, 2, 6, 7, 8, 9])
    with pytest.warns(UserWarning, match="read at 24, each time the nearest frame: 3 frames are repeated, 0 left out"):
        video = read_video(path, fps=24.0)
    assert numbers(video.frames) == [0, 1, 2, 2, 2, 3, 3, 4, 5, 6]


def test_a_clip_whose_clock_starts_late_starts_at_its_first_frame(tmp_path):
    path = write(tmp_path / "late.mkv", greys(9), [48 + n for n in range(9)])
    with warnings.catch_warnings(action="error"):
        assert numbers(read_video(path).frames) == list(range(9))
    assert numbers(read_video(path, start=5 / 24).frames) == [5, 6, 7, 8]


def test_timestamps_rounded_to_milliseconds_lose_no_frame(tmp_path):
    path = write(
        tmp_path / "ntsc.mkv", greys(20), [1001 * n for n in range(20)], base=30_000, rate=Fraction(30_000, 1001)
    )
    with warnings.catch_warnings(action="error"):
        assert numbers(read_video(path, fps=30_000 / 1001).frames) == list(range(20))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("ten_bits.mp4", "libx264", "yuv420p10le"),
        ("full_chroma.mkv", "libx264", "yuv444p"),
        ("rgb.mkv", "ffv1", "bgr0"),
        ("grey.mkv", "ffv1", "gray"),
        ("full_range.avi", "mjpeg", "yuvj420p"),
        ("palette.gif", "gif", "rgb8"),
        ("stream.ts", "libx264", "yuv420p"),
        ("web.webm", "libvpx", "yuv420p"),
    ],
)
def test_formats_people_have_are_read(tmp_path, name, codec, pix_fmt):
    base = 25  # which GIF, in hundredths of a second, can hold
    path = write(tmp_path / name, greys(8), list(range(8)), base=base, codec=codec, pix_fmt=pix_fmt)
    with warnings.catch_warnings(action="error"):
        video = read_video(path)
    assert (video.frames.shape, video.fps, video.waveform) == ((8, 32, 48, 3), 25.0, None)
    # An eight-colour palette of greys cannot tell neighbours apart; it can tell that they rise.
    got = numbers(video.frames)
    assert got == list(range(8)) if codec != "gif" else got == sorted(got) and got[-1] - got[0] >= 5


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_clips_are_upright(tmp_path, degrees, mirrored):
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32] = 200  # one corner, in a picture that is wider than high
    path = tmp_path / "turned.mp4"
    # What the camera stored; the file says: mirror it, then turn it counter-clockwise.
    stored = np.rot90(upright[:, ::-1] if mirrored else upright, -degrees // 90)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
        stream.set_display_rotation(degrees, hflip=mirrored)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="rgb24")))
        container.mux(stream.encode())
    frames = read_video(path).frames
    assert frames.shape == (3, 32, 64, 3)
    assert np.abs(frames[0].astype(int) - upright).mean() < 4  # the edge between the levels blurs
    facts = probe_video(path)
    assert (facts.width, facts.height) == (64, 32)


def test_pixels_that_are_not_square_become_square(tmp_path):
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for image in greys(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    assert read_video(path).frames.shape == (3, 32, 64, 3)


def test_a_colon_in_a_name_is_no_protocol(tmp_path):
    write_mp4(tmp_path / "take:1.mp4", greys(3), fps=24.0)
    assert numbers(read_video(tmp_path / "take:1.mp4").frames) == [0, 1, 2]


def test_a_title_in_another_encoding_does_no_harm(tmp_path):
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        container.metadata["title"] = "Cafe au lait"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(greys(1)[0].copy(), format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Cafe", b"Caf\xe9"))
    assert numbers(read_video(path).frames) == [0]


def test_facts_are_those_of_the_frames(clip):
    facts = probe_video(clip)
    assert (facts.width, facts.height, facts.fps, facts.num_frames, facts.seconds) == (48, 32, 24.0, 24, 1.0)
    assert facts.has_audio


@pytest.mark.parametrize("name", ["clip.mkv", "clip.ts", "clip.h264"])
def test_facts_need_no_length_in_the_header(tmp_path, name):
    path = write(tmp_path / name, greys(16), list(range(16)), base=25)
    facts = probe_video(path)
    assert (facts.num_frames, facts.fps, facts.has_audio) == (16, 25.0, False)
    assert facts.seconds == pytest.approx(16 / 25, abs=1e-3)
    assert numbers(read_video(path, start=0.2, num_frames=4).frames) == [5, 6, 7, 8]


def test_a_seek_that_lands_behind_its_time_is_made_up_for(tmp_path):
    # MPEG transport streams have no index: positions are guessed from bytes.
    path = write(tmp_path / "clip.ts", greys(24), list(range(24)), base=25)
    for first in range(0, 24, 5):
        assert numbers(read_video(path, start=first / 25, num_frames=1).frames) == [first]


@pytest.mark.parametrize("read", [read_video, probe_video])
def test_what_is_no_clip_is_refused(tmp_path, read):
    with pytest.raises(MediaError, match="there is no file at"):
        read(tmp_path / "missing.mp4")
    with pytest.raises(MediaError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "text.mp4").write_text("hello, I am no clip\n" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4"):
        with pytest.raises(MediaError, match="cannot be read as video or audio"):
            read(tmp_path / name)
    write_wav(tmp_path / "sound.wav", clicks([0.1], 0.5), RATE_HZ)
    with pytest.raises(MediaError, match="has no video stream"):
        read(tmp_path / "sound.wav")


def test_the_cover_of_a_song_is_no_clip(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "cover.png")
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container, av.open(str(tmp_path / "cover.png")) as cover:
        sound = container.add_stream("libmp3lame", rate=RATE_HZ, layout="stereo")
        picture = container.add_stream_from_template(cover.streams.video[0])
        picture.disposition = av.stream.Disposition.attached_pic
        for packet in cover.demux(video=0):
            if packet.size:
                packet.stream = picture
                container.mux(packet)
        frame = av.AudioFrame.from_ndarray(clicks([0.1], 0.5).T.copy(), format="fltp", layout="stereo")
        frame.sample_rate = RATE_HZ
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(MediaError, match="has no video stream"):
        read_video(path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_clip_that_is_cut_off_is_refused(tmp_path, name, kept):
    random = np.random.default_rng(0).integers(0, 255, (60, 32, 48, 3), np.uint8)
    path = tmp_path / name
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for image in random:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert len(read_video(path).frames) == 60
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(MediaError, match="cut off"):
        read_video(path)


def test_a_header_without_frames_is_refused(tmp_path):
    path = write(tmp_path / "clip.ts", greys(8), list(range(8)))
    path.write_bytes(path.read_bytes()[: 188 * 3])  # the tables of a transport stream, and the begin of a frame
    with pytest.raises(MediaError):
        read_video(path)
