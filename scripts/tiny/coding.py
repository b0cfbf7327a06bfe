"""The stages that train what codes pictures, sound and text: autoencoders, vocoder and text encoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ltx_jax.geometry import patchify_audio
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.gemma import Gemma
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.models.vocoder import Vocoder
from ltx_jax.text import load_tokenizer, tokenize
from ltx_jax.training.autoencoders import (
    audio_vae_loss,
    bandwidth_loss,
    centre,
    learnt,
    measured_statistics,
    set_filters,
    start_smoothly,
    video_vae_loss,
    vocoder_loss,
)
from ltx_jax.training.language import Texts, language_loss
from ltx_jax.training.loop import Schedule, Trainer
from scripts.tiny import clips, release, words, world
from scripts.tiny.stages import CONFIGS, Run, Stage, muon, trained

# Clips are numbered on from one stage of the video autoencoder to the next, four a step.
SHARP_FROM, FINE_FROM, DECODER_FROM = 5000, 9000, 10600
VOCODER_FINE_FROM = 1500  # steps
GRID_HZ = CONFIGS.audio_vae.sample_rate_hz / CONFIGS.audio_vae.hop_length  # frames of a spectrogram a second
STATISTICS_CLIPS = 240  # that statistics of latents are measured over


def _clips(step: int, seed: int) -> np.ndarray:
    """Four whole clips, upright ones every third step."""
    return np.stack([clips.clip_of(4 * step + i, seed=seed, upright=step % 3 == 2) for i in range(4)])


def video_vae(run: Run) -> Stage:
    model = VideoVAE(CONFIGS.video_vae, rngs=nnx.Rngs(run.seed))
    start_smoothly(model)
    return Trainer(model, video_vae_loss, muon(run.num_steps, run.seed)), lambda step: _clips(step, run.seed)


def video_vae_sharp(run: Run) -> Stage:
    """The same on, with other clips, where edges count."""
    loss = partial(video_vae_loss, edge_weight=0.5)
    schedule = muon(run.num_steps, run.seed + 1, learning_rate=6e-3)
    return Trainer(trained(run.folder, "video-vae"), loss, schedule), lambda step: _clips(step + SHARP_FROM, run.seed)


def video_vae_fine(run: Run) -> Stage:
    """And on, where outlines count most: what tells a square from a circle is a few pixels."""
    loss = partial(video_vae_loss, edge_weight=0.5, outline_weight=4.0)
    schedule = muon(run.num_steps, run.seed + 2, learning_rate=4e-3)
    return Trainer(trained(run.folder, "video-vae-sharp"), loss, schedule), lambda step: _clips(
        step + FINE_FROM, run.seed
    )


def video_decoder(run: Run) -> Stage:
    """And the decoder alone: latents stay what they are, so what was trained on them stays right."""

    def decoding(path: Any, value: Any) -> bool:
        return isinstance(value, nnx.Param) and path[0] == "decoder"

    loss = partial(video_vae_loss, edge_weight=0.5, outline_weight=6.0)
    trainer = Trainer(
        trained(run.folder, "video-vae-fine"),
        loss,
        muon(run.num_steps, run.seed + 3, learning_rate=3e-3),
        trainable=decoding,
    )
    return trainer, lambda step: _clips(step + DECODER_FROM, run.seed)


def audio_vae(run: Run) -> Stage:
    def batches(step: int) -> jax.Array:
        return clips.mel_of(clips.sounds_of(range(4 * step, 4 * step + 4), seed=run.seed), CONFIGS.audio_vae)

    model: Any = AudioVAE(CONFIGS.audio_vae, rngs=nnx.Rngs(run.seed))
    # Logarithms of silence are far from zero, and a bias learns slowly.
    model.decoder.conv_out.bias.set_value(jnp.full(2, jnp.mean(batches(0))))
    return Trainer(model, audio_vae_loss, muon(run.num_steps, run.seed)), batches


def _mels_and_sounds(folder: Path, seed: int, first_step: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Pieces of spectrograms, half of which the audio autoencoder has seen before, and their waveforms."""
    autoencoder = trained(folder, "audio-vae")
    frames, hop = 32, CONFIGS.audio_vae.hop_length

    @jax.jit
    def coded(mel: jax.Array) -> jax.Array:
        return autoencoder.decode(autoencoder.encode(mel))

    def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
        step += first_step
        indices = range(6 * step, 6 * step + 6)
        mel = clips.mel_of(clips.sounds_of(indices, seed=seed), CONFIGS.audio_vae)
        waveform = clips.sounds_of(indices, seed=seed, grid_hz=GRID_HZ)
        mels = [np.asarray(mel), np.asarray(coded(mel))]
        rng = np.random.default_rng([seed, step])
        pieces = []
        for i in range(len(waveform)):
            start = int(rng.integers(mels[1].shape[1] - frames))
            piece = slice(start, start + frames), slice(start * hop, (start + frames) * hop)
            pieces.append((mels[(i + step) % 2][i, piece[0]], waveform[i, piece[1]]))
        inputs, targets = zip(*pieces, strict=True)
        return np.stack(inputs), np.stack(targets)

    return batches


def vocoder(run: Run) -> Stage:
    """The base generator."""
    batches = _mels_and_sounds(run.folder, run.seed, 0)
    model = Vocoder(CONFIGS.vocoder, rngs=nnx.Rngs(run.seed))
    set_filters(model)
    # Logarithms of magnitudes are large, and make a loud noise of the first weights.
    model.base.conv_post.kernel.set_value(0.01 * model.base.conv_post.kernel[...])
    centre(model.base, float(np.mean(batches(0)[0])))
    loss = partial(vocoder_loss, waveform_weight=2.0)
    return Trainer(model, loss, muon(run.num_steps, run.seed), trainable=learnt("base")), batches


def vocoder_fine(run: Run) -> Stage:
    """The same on, where samples count more: the highest partials, which few chords have, are learnt last."""
    loss = partial(vocoder_loss, waveform_weight=6.0)
    schedule = muon(run.num_steps, run.seed + 1, learning_rate=6e-3)
    trainer = Trainer(trained(run.folder, "vocoder"), loss, schedule, trainable=learnt("base"))
    return trainer, _mels_and_sounds(run.folder, run.seed, VOCODER_FINE_FROM)


def bandwidth(run: Run) -> Stage:
    """The generator of high frequencies, which only clicks have; it begins as none."""

    def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
        indices = range(3 * step, 3 * step + 3)
        rates = CONFIGS.vocoder.input_sample_rate_hz, CONFIGS.vocoder.sample_rate_hz
        start = int(np.random.default_rng([run.seed, step]).integers(16)) * CONFIGS.vocoder.bwe_hop_length * 10
        low, high = (clips.sounds_of(indices, seed=run.seed, sample_rate_hz=rate, grid_hz=GRID_HZ) for rate in rates)
        ratio = rates[1] // rates[0]
        return low[:, start : start + 12800], high[:, start * ratio : (start + 12800) * ratio]

    model = trained(run.folder, "vocoder-fine")
    model.bwe.conv_post.kernel.set_value(jnp.zeros_like(model.bwe.conv_post.kernel[...]))
    schedule = Schedule(num_steps=run.num_steps, learning_rate=1e-3, warmup_steps=50, seed=run.seed)
    return Trainer(model, bandwidth_loss, schedule, trainable=learnt("bwe")), batches


def language(run: Run) -> Stage:
    """The text encoder, as a language model of captions."""
    words.write_tokenizer(run.folder / "tokenizer")
    tokenizer = load_tokenizer(run.folder / "tokenizer")

    def batches(step: int) -> Texts:
        toys = [world.sample("train", run.seed, 32 * step + i) for i in range(32)]
        return Texts(*tokenize(tokenizer, [toy.paraphrase for toy in toys]))

    assert CONFIGS.gemma is not None
    schedule = Schedule(num_steps=run.num_steps, learning_rate=3e-3, seed=run.seed, average_decay=0.99)
    return Trainer(Gemma(CONFIGS.gemma, rngs=nnx.Rngs(run.seed)), language_loss, schedule), batches


def set_statistics(model: VideoVAE | AudioVAE, seed: int) -> None:
    """Gives a trained autoencoder the mean and deviation of its latents over training clips, in place."""
    if isinstance(model, VideoVAE):
        pixels = ([clips.pixels_of(world.sample("train", seed, i), width=release.WIDTH, height=release.HEIGHT)]
                  for i in range(STATISTICS_CLIPS))  # fmt: skip
        encode = jax.jit(lambda encoder, x: encoder(x))
        latents = (np.asarray(encode(model.encoder, np.stack(clip))) for clip in pixels)
    else:
        encode = jax.jit(lambda encoder, x: patchify_audio(encoder(x)))
        sounds = (clips.sounds_of(range(i, i + 1), seed=seed) for i in range(STATISTICS_CLIPS))
        latents = (np.asarray(encode(model.encoder, clips.mel_of(sound, CONFIGS.audio_vae))) for sound in sounds)
    mean, std = measured_statistics(latents)
    model.statistics.mean.set_value(jnp.asarray(mean, jnp.float32))
    model.statistics.std.set_value(jnp.asarray(std, jnp.float32))
