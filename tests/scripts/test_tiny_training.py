"""What trains the miniature release: its words, its clips, and the weights of stages that are kept."""

import jax
import numpy as np
import pytest

from scripts.tiny import clips, release, train, words, world


def test_the_tokenizer_knows_every_caption(tmp_path):
    words.write_tokenizer(tmp_path)
    tokenizer = train.load_tokenizer(tmp_path, vocab_size=release.GEMMA["vocab_size"])
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


def test_kept_weights_code_clips_that_were_not_trained_on(tmp_path):
    vae = train.trained(tmp_path, "video-vae-sharp")
    toys = [world.sample("test", 0, i) for i in range(4)]
    pixels = np.stack([clips.pixels_of(toy, width=release.WIDTH, height=release.HEIGHT) for toy in toys])
    latents = jax.jit(lambda vae, x: vae.encode(x))(vae, pixels)
    assert latents.shape == (4, 5, 3, 4, release.VAE["latent_channels"])
    # Normalised over training clips: four others are near.
    assert 0.7 < float(np.std(latents)) < 1.4
    made = np.clip(jax.jit(lambda vae, x: vae.decode(x))(vae, latents), -1, 1)
    psnr = 10 * np.log10(4 / np.mean((made - pixels) ** 2, axis=(1, 2, 3, 4)))
    # 28.5 dB is the mean of 24 such clips; a background alone gives 15.
    assert psnr.mean() > 25


def test_a_stage_that_is_missing_says_how_to_train_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m scripts.tiny.train audio-vae"):
        train.trained(tmp_path, "audio-vae")
    with pytest.raises(SystemExit, match="stage must be one of video-vae"):
        train.main("nothing", tmp_path)
