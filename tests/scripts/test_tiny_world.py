"""The little world: captions, splits, picture and sound in step; and the judge, right on its clips, worn or not."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from scripts.tiny.judge import compare, judge
from scripts.tiny.listen import Heard, listen
from scripts.tiny.look import Seen, look
from scripts.tiny.shapes import NEW_SHAPE, SHAPES, outline, signed_distance
from scripts.tiny.world import (
    CAPTION,
    COLOURS,
    GRAMMAR,
    MARGIN,
    MOTIONS,
    SIZES,
    SPLITS,
    Toy,
    combinations,
    contacts,
    is_possible,
    parse,
    pitch_hz,
    poses,
    render,
    sample,
    sound,
)

FPS, NUM_FRAMES, RATE = 24.0, 25, 16000
SECONDS = NUM_FRAMES / FPS
EVERY_SHAPE = (*SHAPES, NEW_SHAPE)
BOUNCING = Toy(shape="circle", colour="red", size="large", motion="bounce", background="grey", sound="click", seed=3)


def clip(toy: Toy, width: int = 128, height: int = 96) -> tuple[np.ndarray, np.ndarray]:
    frames = render(toy, width=width, height=height, num_frames=NUM_FRAMES, fps=FPS)
    return frames, sound(toy, seconds=SECONDS, sample_rate_hz=RATE)


def worn(frames: np.ndarray, seed: int) -> np.ndarray:
    """Resized and back, blurred and noisy, as a small model's clips are."""
    height, width = frames.shape[1:3]
    size = (width * 3 // 4, height * 3 // 4)
    small = [Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR) for frame in frames]
    blur = ImageFilter.GaussianBlur(1.5)
    soft = np.stack([np.asarray(image.resize((width, height)).filter(blur), np.float32) for image in small])
    noise = np.random.default_rng(seed).standard_normal(soft.shape, np.float32) * 8
    return np.clip(soft + noise, 0, 255).astype(np.uint8)


Measured = list[tuple[Toy, Seen, Heard]]


def measured(count: int, *, seed: int, width: int = 128, height: int = 96, wear: bool = False) -> Measured:
    found = []
    for index in range(count):
        toy = sample("train", seed, index, shapes=EVERY_SHAPE)
        frames, waveform = clip(toy, width, height)
        if wear:
            frames = worn(frames, index)
            waveform = waveform + np.random.default_rng(index).normal(0, 0.01, waveform.shape).astype(np.float32)
        found.append((toy, look(frames, FPS), listen(waveform, RATE)))
    return found


@pytest.fixture(scope="module")
def landscape() -> Measured:
    return measured(110, seed=0)


# ---------------------------------------------------------------------- captions and splits


@pytest.mark.parametrize("shapes", [SHAPES, (NEW_SHAPE,)])
def test_every_possible_combination_is_in_exactly_one_split(shapes):
    split = [combinations(name, shapes) for name in SPLITS]
    possible = {words for words in itertools.product(shapes, *list(GRAMMAR.values())[1:]) if is_possible(*words)}
    assert sum(map(len, split)) == len(possible)
    assert set(itertools.chain(*split)) == possible
    assert all(0.07 < len(held_out) / len(possible) < 0.13 for held_out in split[1:])


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_word_and_pair_of_shape_with_colour_or_motion(split):
    every = combinations(split)
    assert {(words[0], words[1]) for words in every} == set(itertools.product(SHAPES, COLOURS))
    assert {(words[0], words[3]) for words in every} == set(itertools.product(SHAPES, MOTIONS)) - {("circle", "spin")}
    assert {words[5] for words in every} == set(GRAMMAR["sound"])
    assert {words[2] for words in every} == set(SIZES)
    assert {words[4] for words in every} == set(GRAMMAR["background"])


def test_the_new_shape_is_never_sampled_unless_asked_for():
    assert NEW_SHAPE not in {words[0] for split in SPLITS for words in combinations(split)}
    assert {sample("train", 0, index, shapes=(NEW_SHAPE,)).shape for index in range(20)} == {NEW_SHAPE}


def test_a_round_of_samples_has_every_combination_once_and_the_next_in_another_order():
    count = len(combinations("test"))
    first, second = ([sample("test", 5, turn * count + i) for i in range(count)] for turn in (0, 1))
    assert Counter(toy.words for toy in first) == Counter(dict.fromkeys(combinations("test"), 1))
    assert {toy.words for toy in second} == {toy.words for toy in first}
    assert [toy.words for toy in second] != [toy.words for toy in first]
    assert len({toy.seed for toy in first + second}) == 2 * count


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="train, validation, test"):
        sample("holdout", 0, 0)


def test_parse_inverts_every_caption():
    for words in itertools.chain(*(combinations(split, EVERY_SHAPE) for split in SPLITS)):
        toy = Toy(**dict(zip(GRAMMAR, words, strict=True)))
        assert parse(toy.caption) == toy


def test_parse_says_what_a_caption_looks_like():
    assert parse(" A large red circle bounces on a grey background,\nwith a click at each bounce. ") == replace(
        BOUNCING, seed=0
    )
    with pytest.raises(ValueError, match="crosses from bottom left to top right"):
        parse("a large red dog bounces on a grey background, with a click at each bounce")


@pytest.mark.parametrize("change", [{"shape": "dog"}, {"motion": "spin"}, {"motion": "grow"}])
def test_what_is_not_of_this_world_is_refused(change):
    with pytest.raises(ValueError, match="circle"):
        replace(BOUNCING, **change)


def test_paraphrases_name_the_same_words_and_half_of_them_are_canonical():
    toys = [replace(BOUNCING, seed=seed) for seed in range(60)]
    said = Counter(toy.paraphrase for toy in toys)
    assert said[BOUNCING.caption] == 30
    assert len(said) == 4
    assert all(word in caption for caption in said for word in ("large", "red", "circle", "bounces", "grey", "click"))
    assert CAPTION.count("{") == len(GRAMMAR)


# ---------------------------------------------------------------------- picture and sound


def test_the_same_seed_gives_the_same_clip_and_another_seed_another():
    toys = [sample("train", 1, 4), sample("train", 1, 4), sample("train", 2, 4)]
    assert toys[0] == toys[1] != toys[2]
    first, again, other = (clip(toy) for toy in (*toys[:2], replace(toys[0], seed=toys[0].seed + 1)))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_shapes_of_one_size_have_one_area_and_their_centre_at_the_origin(shape):
    side = np.linspace(-2, 2, 401)
    x, y = np.meshgrid(side, side)
    inside = signed_distance(shape, x, y) < 0
    assert inside.sum() * 0.01**2 == pytest.approx(np.pi, rel=0.01)  # of squares 0.01 wide along the outline
    assert x[inside].mean() == pytest.approx(0, abs=0.01)
    assert y[inside].mean() == pytest.approx(0, abs=0.01)
    assert np.mean(outline(shape) ** 2) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("width", "height"), [(128, 96), (96, 128), (37, 90), (256, 48)])
@pytest.mark.parametrize("motion", MOTIONS)
def test_shapes_stay_inside_pictures_of_any_size(motion, width, height):
    for seed in range(4):
        toy = Toy(
            shape="star", colour="white", size="large", motion=motion, background="black", sound="tone", seed=seed
        )
        frames = render(toy, width=width, height=height, num_frames=9, fps=9.0)
        assert frames.shape == (9, height, width, 3)
        assert frames.dtype == np.uint8
        edge = max(1, int(MARGIN * min(width, height)) - 1)  # one pixel is antialiased
        bright = frames.max(axis=-1) > 60
        assert bright.any(axis=(1, 2)).all()
        assert not bright[:, :edge].any()
        assert not bright[:, -edge:].any()
        assert not bright[:, :, :edge].any()
        assert not bright[:, :, -edge:].any()


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_shapes_touch_the_ground_at_contacts_which_are_when_clicks_begin(shape):
    toy = replace(BOUNCING, shape=shape)
    times = contacts(toy, seconds=3.0)
    assert len(times) >= 3
    assert poses(toy, times, seconds=3.0).height == pytest.approx(0, abs=1e-9)
    waveform = sound(toy, seconds=3.0, sample_rate_hz=RATE)
    loud = np.flatnonzero(np.abs(waveform[:, 0]) > 0.01)
    onsets = loud[np.concatenate([[True], np.diff(loud) > RATE // 10])] / RATE
    # The first sample of a burst may be faint: two samples.
    assert onsets == pytest.approx(times, abs=2 / RATE)
    fine = render(toy, width=128, height=96, num_frames=300, fps=100.0)
    lowest = [
        np.flatnonzero(np.abs(frame.astype(int) - frame[0, 0]).max(axis=(1, 2)) > 60)[-1]
        for frame in fine[np.round(times * 100).astype(int)]
    ]
    # The lower margin of 4 pixels; within 5 ms of a contact a shape is at most two above it.
    assert all(89 <= row <= 92 for row in lowest)


def test_the_tone_has_the_pitch_of_the_height():
    toy = replace(BOUNCING, motion="cross", sound="tone")
    waveform = sound(toy, seconds=2.0, sample_rate_hz=RATE)
    for moment in (0.2, 1.0, 1.8):
        # Rising zero crossings in 50 ms, in which the pitch changes by 7 %.
        part = waveform[int((moment - 0.025) * RATE) : int((moment + 0.025) * RATE), 0]
        crossings = np.flatnonzero((part[:-1] < 0) & (part[1:] >= 0))
        hz = RATE * (len(crossings) - 1) / (crossings[-1] - crossings[0])
        height = poses(toy, np.array([moment]), seconds=2.0).height
        assert hz == pytest.approx(pitch_hz(height)[0], rel=0.03)


@pytest.mark.parametrize("kind", GRAMMAR["sound"])
def test_waveforms_are_as_long_as_asked_and_neither_clip_nor_fall_silent(kind):
    for rate in (16000, 24000, 48000):
        waveform = sound(replace(BOUNCING, sound=kind), seconds=SECONDS, sample_rate_hz=rate)
        assert waveform.shape == (round(SECONDS * rate), 2)
        assert waveform.dtype == np.float32
        assert 0.2 < np.abs(waveform).max() < 0.9


# ---------------------------------------------------------------------- the judge


def share_right(clips: Measured) -> float:
    return np.mean([compare(seen, FPS, heard, toy).right for toy, seen, heard in clips])


def test_the_judge_is_right_on_clips_of_the_world(landscape):
    assert share_right(landscape) >= 0.99
    assert share_right(measured(30, seed=1, width=96, height=128)) >= 0.99


def test_the_judge_is_right_on_worn_clips():
    assert share_right(measured(40, seed=2, wear=True)) >= 0.97
    assert share_right(measured(20, seed=3, width=96, height=128, wear=True)) >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(128, 96), (96, 128)])
def test_the_judge_is_right_on_many_clips(width, height):
    assert share_right(measured(300, seed=4, width=width, height=height)) >= 0.99
    assert share_right(measured(300, seed=5, width=width, height=height, wear=True)) >= 0.97


@pytest.mark.parametrize("name", GRAMMAR)
def test_another_word_in_the_caption_makes_that_verdict_wrong_and_no_other(landscape, name):
    outcomes = []
    for toy, seen, heard in landscape:
        if name == "colour" and toy.sound == "chord":
            continue  # the chord is that of the colour: the next test
        others = [word for word in GRAMMAR[name] if word != getattr(toy, name)]
        changed = [dict(zip(GRAMMAR, toy.words, strict=True)) | {name: word} for word in others]
        for words in changed:
            if is_possible(**words):
                verdict = compare(seen, FPS, heard, Toy(**words))
                outcomes.append({part for part in GRAMMAR if not getattr(verdict, part)} == {name})
    assert len(outcomes) >= 100
    assert np.mean(outcomes) >= 0.97


def test_a_chord_of_another_colour_is_heard_to_be_wrong(landscape):
    chords = [(toy, seen, heard) for toy, seen, heard in landscape if toy.sound == "chord"]
    for toy, seen, heard in chords:
        for colour in set(COLOURS) - {toy.colour}:
            verdict = compare(seen, FPS, heard, replace(toy, colour=colour))
            assert not verdict.sound
            assert not verdict.colour
    assert len(chords) >= 30


def test_picture_and_sound_of_the_world_are_in_step(landscape):
    verdicts = [compare(seen, FPS, heard, toy) for toy, seen, heard in landscape]
    assert all(verdict.in_step is (None if verdict.heard.sound == "chord" else True) for verdict in verdicts)
    offsets = [verdict.offset_ms for verdict in verdicts if verdict.offset_ms is not None]
    assert len(offsets) >= 5
    assert np.abs(offsets).max() < 5  # of the 42 ms from frame to frame
    correlations = [verdict.pitch_correlation for verdict in verdicts if verdict.pitch_correlation is not None]
    assert len(correlations) >= 10
    assert min(correlations) > 0.98
    # What spins or grows is not always as high as the room for its whole motion says: a tenth of two octaves.
    assert max(verdict.pitch_error_semitones or 0.0 for verdict in verdicts) < 2.5


@pytest.mark.parametrize("late", [-0.15, 0.2])
def test_clicks_that_come_too_early_or_late_are_measured(late):
    frames, waveform = clip(BOUNCING)
    shifted = np.roll(waveform, round(late * RATE), axis=0)
    verdict = judge(frames, FPS, shifted, RATE, BOUNCING)
    assert verdict.right
    assert verdict.in_step is False
    assert verdict.offset_ms == pytest.approx(1000 * late, abs=5)


def test_clicks_without_a_contact_are_out_of_step():
    frames, waveform = clip(BOUNCING)
    assert judge(frames, FPS, waveform, RATE, BOUNCING).in_step
    twice = np.maximum(waveform, np.roll(waveform, round(0.3 * RATE), axis=0))
    assert judge(frames, FPS, twice, RATE, BOUNCING).in_step is False


def test_a_tone_that_goes_the_other_way_is_out_of_step():
    toy = replace(BOUNCING, motion="cross", sound="tone")
    frames, waveform = clip(toy)
    verdict = judge(frames, FPS, waveform[::-1].copy(), RATE, toy)
    assert verdict.right
    assert verdict.pitch_correlation is not None
    assert verdict.pitch_correlation < -0.98
    assert verdict.in_step is False


def blobs(*discs: tuple[float, float, float, float]) -> np.ndarray:
    """Frames of still red ellipses (x, y, half width, half height) on grey."""
    y, x = np.mgrid[:96, :128]
    inside = np.any([np.hypot((x - cx) / rx, (y - cy) / ry) < 1 for cx, cy, rx, ry in discs], axis=0)
    picture = np.where(inside[..., None], np.array(COLOURS["red"]), 110).astype(np.uint8)
    return np.repeat(picture[None], NUM_FRAMES, axis=0)


@pytest.mark.parametrize(
    "frames",
    [
        np.full((NUM_FRAMES, 96, 128, 3), 110, np.uint8),
        np.random.default_rng(0).integers(90, 130, (NUM_FRAMES, 96, 128, 3), dtype=np.uint8),
        blobs((30, 48, 14, 14), (95, 48, 14, 14)),
    ],
    ids=["plain", "noise", "two"],
)
def test_no_object_is_seen_where_there_is_none_or_more_than_one(frames):
    seen = look(frames, FPS)
    assert seen.visible == 0
    assert (seen.shape, seen.colour, seen.size, seen.motion) == (None,) * 4
    assert seen.background == "grey"
    verdict = judge(frames, FPS, clip(BOUNCING)[1], RATE, BOUNCING)
    assert [part for part in GRAMMAR if getattr(verdict, part)] == ["background", "sound"]
    assert not verdict.right
    assert verdict.in_step is None


def test_a_shape_and_a_motion_that_the_world_does_not_have_are_none_of_them():
    seen = look(blobs((64, 48, 28, 14)), FPS)
    assert (seen.shape, seen.colour, seen.motion) == (None, "red", None)
    falling, _ = clip(replace(BOUNCING, motion="cross", sound="tone"))
    assert look(falling[::-1], FPS).motion is None


@pytest.mark.parametrize(
    "mono",
    [
        np.zeros(RATE),
        np.random.default_rng(0).normal(0, 0.1, RATE),
        0.2 * np.sin(2 * np.pi * 3000 * np.arange(RATE) / RATE),
        0.2 * np.sin(2 * np.pi * np.outer(np.arange(RATE) / RATE, [262, 330, 392])).sum(axis=1) / 3,
    ],
    ids=["silence", "noise", "too high", "another chord"],
)
def test_no_sound_of_the_world_is_heard_where_there_is_none(mono):
    assert listen(np.stack([mono, mono], axis=1).astype(np.float32), RATE).sound is None


@pytest.mark.parametrize("kind", ["tone", "chord", "click"])
def test_a_vocoder_s_grid_leaves_of_a_sound_what_is_heard(kind):
    """The same in every frame that has the same pitch: what a spectrogram without phase can stand for."""
    grid_hz, toy = 50.0, replace(BOUNCING, sound=kind)
    wave = sound(toy, seconds=2.0, sample_rate_hz=RATE, grid_hz=grid_hz)
    free = sound(toy, seconds=2.0, sample_rate_hz=RATE)
    assert wave.shape == free.shape
    heard, expected = listen(wave, RATE), listen(free, RATE)
    assert heard.sound == expected.sound == kind
    assert heard.chord == expected.chord
    hop = round(RATE / grid_hz)
    if kind == "click":
        # Half a frame at most, and what the ear of `listen` is off by.
        assert np.abs(np.array(heard.clicks) - np.array(expected.clicks)).max() < 0.5 / grid_hz + 0.003
        starts = np.flatnonzero(np.abs(wave[:, 0]) > 0) % hop
        assert starts[0] == 0
    else:
        # Every frame begins at phase zero.
        np.testing.assert_allclose(wave[hop * 2 :: hop], 0, atol=1e-6)
    if kind == "chord":
        np.testing.assert_allclose(wave, free, atol=1e-5)
