"""What trains the miniature release: its words, its clips, and its stages."""

import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from convert import convert
from ltx_jax import load_pipeline
from ltx_jax.lora import Lora
from ltx_jax.text import load_tokenizer
from scripts.tiny import build, clips, denoising, release, stages, train, words, world

ROOT = Path(__file__).parents[2]


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
    with pytest.raises(ValueError, match="of 30 clips no large one is upright: take more than 30"):
        denoising.upscaler(stages.Run(folder=tmp_path, num_steps=1, num_clips=30))


def test_a_shipped_release_is_what_training_goes_on_from(tmp_path):
    build.restore(tmp_path, ROOT / "release")
    assert {path.stem for path in tmp_path.iterdir()} == set(stages.FINAL.values())
    for component, stage in stages.FINAL.items():
        model = stages.trained(tmp_path, stage, component)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    # What is there is not replaced.
    kept = tmp_path / f"{stages.FINAL['gemma']}.safetensors"
    kept.write_bytes(b"mine")
    build.restore(tmp_path, ROOT / "release")
    assert kept.read_bytes() == b"mine"


@pytest.mark.slow  # a few minutes for each autoencoder to compile
def test_every_stage_from_nothing_to_a_release_that_generates(tmp_path):
    """scripts/tiny/train.sh as it stands, of one step each: what a stage leaves is what the next one reads."""
    run, made = tmp_path / "run", tmp_path / "release"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = ["scripts/tiny/train.sh", str(run), str(made), "1", "40"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=3600)
    shipped = {path.relative_to(ROOT / "release") for path in (ROOT / "release").rglob("*.*")} - {Path("README.md")}
    assert {path.relative_to(made) for path in made.rglob("*.*")} == shipped

    convert(made / build.PACKAGE, tmp_path / "checkpoint", gemma=made / build.GEMMA, gemma_bits=16)
    loras = [Lora(made / build.LORAS / name) for name in build.SHIPPED_LORAS.values()]
    pipe = load_pipeline(tmp_path / "checkpoint", loras=loras)
    clip = pipe(prompt="a small red star spins", width=release.WIDTH, height=release.HEIGHT, num_frames=9, seed=0)
    assert clip.frames.shape == (9, release.HEIGHT, release.WIDTH, 3)
