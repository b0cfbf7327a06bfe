"""Clips and captions of a folder as training batches: encoded once, grouped by size, captions left out at times."""

import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ltx_jax.engine import Engine
from ltx_jax.geometry import patchify_audio, patchify_video, video_positions
from ltx_jax.latents import Latents
from ltx_jax.media import write_mp4
from ltx_jax.models.connector import Contexts
from ltx_jax.record import FORMAT, RecordError
from ltx_jax.training.data import (
    ContextRow,
    Example,
    Examples,
    StatesRow,
    captioned_clips,
    contexts_of,
    encode_folder,
)
from ltx_jax.training.flow import TextStates


@pytest.fixture(scope="module")
def engine(mini_checkpoint: Path) -> Engine:
    return Engine(mini_checkpoint, keep_prompts=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed, (name, count) in enumerate((("ball", 10), ("short", 5), ("tree", 9))):
        frames = np.random.default_rng(seed).integers(0, 255, (count, 40, 70, 3)).astype(np.uint8)
        sound = 0.1 * np.sin(np.arange(16000)[:, None] * np.ones(2) / 9).astype(np.float32) if name == "ball" else None
        write_mp4(folder / f"{name}.mp4", frames, fps=8.0, waveform=sound, sample_rate_hz=16000)
        (folder / f"{name}.txt").write_text(f"a {name}\n")
    return folder


def test_a_folder_is_encoded_once(engine, folder, tmp_path, monkeypatch):
    size = {"width": 64, "height": 32, "num_frames": 9}
    with pytest.warns(UserWarning, match=r"1 of 3 clips have fewer than 9 frames: short.mp4 \(5\)"):
        examples = encode_folder(engine, folder, tmp_path, **size)
    assert [example.caption for example in examples] == ["a ball", "a tree"]
    assert {example.latents.video.shape for example in examples} == {(1, 2, 1, 2, 16)}
    # 9 frames of 8 a second are 1.125 s: 28 latents of 40 ms.
    assert {example.latents.audio.shape[1] for example in examples} == {28}
    assert np.abs(examples[0].latents.audio - examples[1].latents.audio).max() > 0.1  # one of them is silent

    def refuse(*arguments, **settings):
        raise AssertionError("encoded again")

    texts = contexts_of(engine, examples, tmp_path)
    assert set(texts) == {"", "a ball", "a tree"}
    for name in ("encode_video", "encode_audio", "encode_prompts"):
        monkeypatch.setattr(engine, name, refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (folder / "short.txt").rename(tmp_path / "aside.txt")
        (folder / "short.mp4").rename(tmp_path / "aside.mp4")
        again = encode_folder(engine, folder, tmp_path, **size)
    for first, second in zip(examples, again, strict=True):
        np.testing.assert_array_equal(first.latents.video, second.latents.video)
        np.testing.assert_array_equal(first.latents.audio, second.latents.audio)
    for text, row in contexts_of(engine, again, tmp_path).items():
        np.testing.assert_array_equal(row.video, texts[text].video)
    batch = Examples(again, texts, engine.configs, batch_size=3)(0)
    assert isinstance(batch.text, Contexts)
    assert batch.video.shape == (3, 4, 16)


def test_clips_and_captions_must_be_pairs(tmp_path):
    with pytest.raises(ValueError, match="holds no clips"):
        captioned_clips(tmp_path)
    for name in ("a.mp4", "b.mp4", "b.txt", "c.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"without partner: a.mp4 \(no a.txt\), c.txt \(no c.mp4\)"):
        captioned_clips(tmp_path)


def test_clips_that_were_generated_have_their_prompt_beside_them(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").write_text("x")
    for name in ("a", "b"):
        record = {"format": FORMAT, "settings": {"prompt": f"prompt of {name}"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "b.txt").write_text("what was written by hand counts\n")
    with pytest.raises(ValueError, match=r"without partner: c.mp4 \(no c.txt\)$"):
        captioned_clips(tmp_path)
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(RecordError, match=r"c\.json was not written beside a clip by generate\.py"):
        captioned_clips(tmp_path)
    (tmp_path / "c.mp4").unlink()
    captions = [caption for _, caption in captioned_clips(tmp_path)]
    assert captions == ["prompt of a", "what was written by hand counts"]


def example(configs, caption: str, *, frames: int = 2) -> Example:
    rng = np.random.default_rng(len(caption))
    video = jnp.asarray(rng.normal(size=(1, frames, 1, 2, configs.transformer.video.in_channels)), jnp.float32)
    audio = configs.audio_vae
    sound = jnp.asarray(rng.normal(size=(1, 3, audio.latent_bins, audio.latent_channels)), jnp.float32)
    return Example(latents=Latents(video=video, audio=sound), fps=8.0, caption=caption)


def rows(captions) -> dict[str, StatesRow]:
    return {text: StatesRow(np.full((2, 4, 3), len(text), np.float32), np.ones(4, bool)) for text in captions}


def test_batches_are_of_one_size_of_as_many_tokens_and_repeat(engine):
    configs = engine.configs
    captions = ["a", "bb", "ccc"]
    clips = [example(configs, "a"), example(configs, "bb"), example(configs, "ccc", frames=3)]
    batches = Examples(clips, rows(["", *captions]), configs, batch_size=6, caption_dropout=0.5, seed=3)
    lengths, said = set(), []
    for step in range(20):
        batch = batches(step)
        assert isinstance(batch.text, TextStates)
        frames = batch.video.shape[1] // 2
        lengths.add(frames)
        # Of 6 tokens a clip instead of 4, a batch of as many tokens holds 4 clips instead of 6.
        assert len(batch.video) == {2: 6, 3: 4}[frames]
        for clip, spoken in zip(batch.video, batch.text.hidden[:, 0, 0, 0], strict=True):
            matches = [x for x in clips if x.latents.video.shape[1] == frames and np.array_equal(
                patchify_video(x.latents.video)[0], clip)]  # fmt: skip
            assert len(matches) == 1
            assert int(spoken) in (0, len(matches[0].caption))
            said.append(int(spoken) == 0)
        expected = video_positions((frames, 1, 2), fps=8.0, scale=configs.video_vae.scale)
        np.testing.assert_array_equal(batch.video_positions[3], expected[0])
    assert lengths == {2, 3}
    assert 0.3 < np.mean(said) < 0.7  # of about 110, with a standard error of 0.05
    np.testing.assert_array_equal(batches(7).video, batches(7).video)
    audio = patchify_audio(clips[0].latents.audio)
    assert batches(0).audio.shape[2] == audio.shape[2]


def test_unread_captions_are_refused(engine):
    clips = [example(engine.configs, "a")]
    with pytest.raises(ValueError, match="1 captions have not been read"):
        Examples(clips, rows([""]), engine.configs, batch_size=1)
    with pytest.raises(ValueError, match="no examples"):
        Examples([], {"": ContextRow(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))}, engine.configs,
                 batch_size=1)  # fmt: skip
