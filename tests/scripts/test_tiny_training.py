"""What trains the miniature release: its words, its clips, and its stages."""

import numpy as np
import pytest

from ltx_jax.text import load_tokenizer
from scripts.tiny import clips, release, stages, train, words, world


def test_the_tokenizer_knows_every_caption(tmp_path):
    words.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, vocab_size=release.GEMMA["vocab_size"])
    unknown = words.SPECIAL.index("<unk>")
    for i in range(300):
        for shapes in (world.SHAPES, (world.NEW_SHAPE,)):
            encoded = tokenizer.encode(world.sample("train", 0, i, shapes=shapes).paraphrase)
            assert unknown not in encoded.token_ids
            assert not encoded.dropped_text
    assert unknown in tokenizer.encode("a heron lands").token_ids


@pytest.mark.parametrize("upright", [False, True])
def test_training_clips_are_of_one_size_and_repeat(upright):
    shape = (release.NUM_FRAMES, release.WIDTH, release.HEIGHT) if upright else (
        release.NUM_FRAMES, release.HEIGHT, release.WIDTH)  # fmt: skip
    for index in range(8):
        clip = clips.clip_of(index, seed=0, upright=upright)
        assert clip.shape == (*shape, 3)
        assert np.abs(clip).max() <= 1
        np.testing.assert_array_equal(clip, clips.clip_of(index, seed=0, upright=upright))


def test_every_sound_is_heard_equally_often():
    kinds = [clips.toy_of_every_sound(index, seed=0).sound for index in range(30)]
    assert {kind: kinds.count(kind) for kind in world.SOUNDS} == dict.fromkeys(world.SOUNDS, 10)


def test_a_stage_that_is_missing_says_how_to_train_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m scripts.tiny.train audio-vae"):
        stages.trained(tmp_path, "audio-vae")
    with pytest.raises(SystemExit, match="stage must be one of video-vae"):
        train.main("nothing", tmp_path)
