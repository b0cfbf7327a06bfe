"""Trains one model of the miniature release after the other: `python -m scripts.tiny.train STAGE FOLDER`.

Each stage writes its run to `FOLDER/STAGE` (snapshots, `metrics.jsonl`), goes on where it was stopped, and leaves what
it made in `FOLDER/STAGE.safetensors`. `scripts/tiny/train.sh` runs them all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from convert.official import write_parts, write_upscaler
from ltx_jax.environment import prepare
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.progress import TerminalProgress
from scripts.tiny import coding, denoising, release
from scripts.tiny.stages import COMPONENTS, Run, Stage

STAGES: dict[str, tuple[Callable[[Run], Stage], int]] = {
    "video-vae": (coding.video_vae, coding.SHARP_FROM),
    "video-vae-sharp": (coding.video_vae_sharp, coding.FINE_FROM - coding.SHARP_FROM),
    "video-vae-fine": (coding.video_vae_fine, coding.DECODER_FROM - coding.FINE_FROM),
    "video-decoder": (coding.video_decoder, 1200),
    "audio-vae": (coding.audio_vae, 2500),
    "vocoder": (coding.vocoder, coding.VOCODER_FINE_FROM),
    "vocoder-fine": (coding.vocoder_fine, 700),
    "bandwidth": (coding.bandwidth, 300),
    "language": (coding.language, 600),
    "upscaler": (denoising.upscaler, 3000),
    "transformer": (denoising.transformer, 4500),
    "transformer-fine": (denoising.transformer_fine, 3200),
    "distilled": (denoising.distilled, 800),
}


def main(
    stage: Annotated[str, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    *,
    seed: int = 0,
    steps: int | None = None,
    clips: int = Run.num_clips,
) -> None:
    """Trains a stage of the miniature release, or goes on with it; what is finished is `FOLDER/STAGE.safetensors`.

    `clips` are those whose latents the transformer is trained on, encoded once for all stages.
    """
    if stage not in STAGES:
        raise SystemExit(f"stage must be one of {', '.join(STAGES)}; got {stage!r}")
    prepare()
    make, num_steps = STAGES[stage]
    trainer, batches = make(Run(folder=folder, num_steps=steps or num_steps, seed=seed, num_clips=clips))
    trainer.train(batches, folder / stage, progress=TerminalProgress(), name=stage)
    model = trainer.model()
    path = folder / f"{stage}.safetensors"
    match stage:
        case "distilled":
            denoising.write_lora(path, folder, model)
        case "upscaler":
            write_upscaler(path, model, release.UPSCALER)
        case "transformer" | "transformer-fine":
            write_parts(path, {part: getattr(model, part) for part in ("transformer", "connectors")})
        case _:
            if isinstance(model, VideoVAE | AudioVAE) and stage != "video-decoder":  # whose latents are there already
                coding.set_statistics(model, seed)
            write_parts(path, {COMPONENTS[stage]: model})


if __name__ == "__main__":
    tyro.cli(main)
