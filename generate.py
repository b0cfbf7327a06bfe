"""Prompt to clip on the command line: arguments in, one pipeline call, files out.

python generate.py --checkpoint DIR --prompt "a heron lands on still water" --output heron.mp4
"""

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from einops import rearrange
from rich.console import Console
from safetensors.flax import save_file

from ltx_jax.cache import written_whole
from ltx_jax.cards import find_card
from ltx_jax.checkpoint import MANIFEST
from ltx_jax.clip import latents_of
from ltx_jax.config import VideoVAEConfig
from ltx_jax.denoise import Pair
from ltx_jax.environment import prepare
from ltx_jax.geometry import VideoGrid
from ltx_jax.lora import Lora
from ltx_jax.media import check_writable, read_audio, read_image, write_mp4, write_wav
from ltx_jax.memory import peak_rss_bytes
from ltx_jax.modes import images_of, parse_image
from ltx_jax.noise import read_noise
from ltx_jax.pipeline import Callback, Latents, Pipeline, load_pipeline
from ltx_jax.plan import Offload, Plan, plan_published, plan_table, refusal
from ltx_jax.presets import LTX_2_3
from ltx_jax.preview import kept_factors, preview, write_preview
from ltx_jax.progress import TerminalProgress
from ltx_jax.replay import Replay
from ltx_jax.settings import Settings

CLIP_FORMAT = "ltx-jax clip"
PATHS = ("audio", "video", "reference", "noise")  # settings that name a file


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Generates a clip with sound from a prompt, from a checkpoint that `python -m convert` made."""

    checkpoint: Path | None = None
    """The converted checkpoint folder. Only --plan does without: it then plans for the published 5-bit LTX-2.3."""
    output: Path = Path("clip.mp4")
    """The clip to write; its settings go beside it as .json. A name that ends in .wav asks for the sound alone."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file as PATH, PATH:STRENGTH or, for two stages, PATH:STRENGTH:STRENGTH; may be given several times."""
    distilled_lora: Path | None = None
    """The distilled LoRA of a dev checkpoint, for the second of two stages (hq: at 0.25 and 0.5 in both)."""
    save_latents: Path | None = None
    """Also write the final latents (out.video_latent, out.audio_latent) to this safetensors file."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of activations; None: float32 on a CPU (the reference's numbers), bfloat16 elsewhere."""
    offload: Offload = "auto"
    """Stream the layers of large models from host memory: auto where the plan says so, blocks always, none never."""
    plan: bool = False
    """Print what the clip needs, stage by stage, and stop. Nothing is loaded."""
    card: str | None = None
    """With --plan: a card by name, such as rtx4090, in place of the device at hand."""
    json: bool = False
    """With --plan: print JSON."""
    watch: Path | None = None
    """Keep a small animation of the clip in this file (.png or .gif) while it is denoised, new at every step."""
    resume: bool = False
    """Go on with the run into the same output that was cut off; the result is the same, bit for bit."""
    keep_prompts: bool = True
    """Keep the contexts of prompts in the user's cache folder, so that a known prompt needs no text encoder."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A clip's .json: repeat that clip; flags given as well take the place of its settings."""


class UsageError(ValueError):
    """Arguments that cannot be used."""


def parse_lora(text: str) -> Lora:
    """`PATH`, `PATH:STRENGTH` or `PATH:STRENGTH:STRENGTH`."""
    path, strengths = text, []
    while not Path(path).exists() and len(strengths) < 2:
        head, colon, tail = path.rpartition(":")
        try:
            strengths.insert(0, float(tail))
        except ValueError:  # a colon within the name
            break
        path = head if colon else path
    if not Path(path).is_file():
        raise UsageError(f"there is no LoRA file at {path}; give --lora PATH or --lora PATH:STRENGTH")
    return Lora(Path(path), *strengths)


def loras_of(arguments: "Arguments") -> list[Lora]:
    """All LoRAs of a run. Raises UsageError for a file that is not there, or has no stage to act in."""
    loras = [parse_lora(text) for text in arguments.lora]
    if arguments.distilled_lora is not None:
        pipeline = arguments.settings.pipeline
        if arguments.settings.num_stages == 1:
            raise UsageError(f"--distilled-lora is for two stages, {pipeline} has one; --lora adds any other")
        lora = parse_lora(str(arguments.distilled_lora))
        loras.append(Lora(lora.path, 0.25, 0.5) if pipeline == "hq" else Lora(lora.path, 0.0, 1.0))
    return loras


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_clip_json(path: Path) -> dict[str, Any]:
    """What a clip's .json says. Raises UsageError if it is not one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as the .json of a clip: {error}") from error
    if not isinstance(content, dict) or content.get("format") != CLIP_FORMAT:
        raise UsageError(f"{path} was not written beside a clip by generate.py")
    return content


def arguments_from(content: dict[str, Any]) -> dict[str, Any]:
    """The defaults that a clip's .json gives to the arguments."""
    known = {f.name for f in fields(Settings)}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in content["settings"].items() if k in known
    }
    for name in PATHS:
        if values.get(name) is not None:
            values[name] = Path(values[name])
    for path, digest in content["files"].items():
        if not Path(path).is_file():
            raise UsageError(f"the clip was made with {path}, which is not there any more")
        if sha256(Path(path)) != digest:
            warnings.warn(f"{path} has changed since the clip was made: the new clip will differ", stacklevel=2)
    return {
        "checkpoint": Path(content["checkpoint"]),
        "settings": Settings(**values),
        "lora": tuple(content["lora"]),
        "dtype": content["dtype"],
    }


def parse_arguments(argv: list[str]) -> tuple[Arguments, dict[str, Any] | None]:
    """The arguments, those of an earlier clip filled in below those given."""
    earlier = None
    for index, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == "--from":
            if not value and index + 1 == len(argv):
                break
            earlier = read_clip_json(Path(value or argv[index + 1]))
    if earlier is None:
        return tyro.cli(Arguments, args=argv), None
    default = Arguments(**arguments_from(earlier))
    return tyro.cli(Arguments, args=argv, default=default), earlier


def clip_json(arguments: Arguments, loras: list[Lora]) -> dict[str, Any]:
    """Everything needed to make the same clip again, bit for bit on the same machine."""
    settings, checkpoint = arguments.settings, arguments.checkpoint
    assert checkpoint is not None
    values = asdict(settings)
    files = [lora.path.resolve() for lora in loras]
    images = [parse_image(text) for text in settings.image]
    files += [path.resolve() for path, _, _ in images]
    values["image"] = [
        f"{path.resolve()}@{frame}" + ("" if strength is None else f":{strength}") for path, frame, strength in images
    ]
    for name in PATHS:
        path = getattr(settings, name)
        if path is not None:
            files.append(path.resolve())
            values[name] = str(path.resolve())
    return {
        "format": CLIP_FORMAT,
        "settings": values,
        "checkpoint": str(checkpoint.resolve()),
        "checkpoint_sha256": sha256(checkpoint / MANIFEST),
        "lora": [":".join(map(str, [lora.path.resolve(), lora.strength, lora.in_stage(2)])) for lora in loras],
        "dtype": arguments.dtype,
        "files": {str(path): sha256(path) for path in files},
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def save_latents(path: Path, latents: Latents) -> None:
    """Writes the latents in the axes that the reference uses: channels before frames."""
    with written_whole(path) as temporary:
        arrays = {
            "out.video_latent": rearrange(latents.video, "b f h w c -> b c f h w"),
            "out.audio_latent": rearrange(latents.audio, "b t bins c -> b c t bins"),
        }
        save_file({name: jnp.asarray(array) for name, array in arrays.items()}, str(temporary))


def print_plan(arguments: Arguments) -> None:
    """The plan of a clip for a card or the device at hand, as a table or as JSON."""
    target = None if arguments.card is None else find_card(arguments.card)
    progress = TerminalProgress()
    make: Callable[[Settings], Plan]
    if arguments.checkpoint is None:
        make = partial(
            plan_published, target=target, dtype=arguments.dtype, offload=arguments.offload, told=progress.say
        )
        scale = VideoVAEConfig.from_metadata(LTX_2_3["vae"]).scale
    else:
        pipe = load_pipeline(
            arguments.checkpoint,
            dtype=arguments.dtype,
            loras=loras_of(arguments),
            offload=arguments.offload,
            progress=progress,
        )
        make = partial(pipe.plan, target=target, adopt=False)
        scale = pipe.configs.video_vae.scale
    plan = make(arguments.settings)
    if arguments.json:
        print(json.dumps(plan.as_json(), indent=1))
    else:
        Console(width=max(Console().width, 110)).print(plan_table(plan))
        print(plan.line() if plan.fits else refusal(make, arguments.settings, plan, scale=scale))


def watcher(pipe: Pipeline, path: Path, settings: Settings, grid: VideoGrid) -> Callback:
    """Called after every model call: shows what the clip will be."""
    factors = kept_factors(pipe.manifest, lambda: pipe.model("video_vae"))
    stages = settings.stages(pipe.configs.transformer.num_layers, grid)

    def show(stage: int, step: int, sigma: float, tokens: Pair, denoised: Pair) -> None:
        if denoised.video is not None:
            latents = latents_of(pipe, denoised, stages[stage - 1].grid(grid)).video
            write_preview(path, preview(latents, factors), fps=grid.fps / grid.scale[0])

    return show


def run(arguments: Arguments, earlier: dict[str, Any] | None) -> None:
    started = time.monotonic()
    if arguments.output.suffix.lower() == ".wav":
        arguments = replace(arguments, settings=replace(arguments.settings, sound_only=True))
    if arguments.plan:
        return print_plan(arguments)
    for flag, given in (("--card", arguments.card is not None), ("--json", arguments.json)):
        if given:
            raise UsageError(f"{flag} is for --plan")
    if arguments.checkpoint is None:
        raise UsageError("--checkpoint is missing: the folder that `python -m convert` made")
    output = arguments.output
    if output.suffix.lower() not in (".mp4", ".wav"):
        raise UsageError(f"the output must end in .mp4, or in .wav for the sound alone, got {output}")
    settings = arguments.settings
    if settings.sound_only and output.suffix.lower() != ".wav":
        raise UsageError(f"--sound-only makes no picture: the output must end in .wav, got {output}")
    for path in (output, output.with_suffix(".json"), arguments.save_latents):
        if path is not None:
            check_writable(path)
    if arguments.watch is not None:
        check_writable(arguments.watch, suffixes=(".png", ".gif"))
    # What cannot be read should fail before models are loaded, not after.
    for path, _ in images_of(settings):
        read_image(path)
    for path in (settings.audio, settings.video, settings.reference):
        if path is not None and not path.is_file():
            raise UsageError(f"there is no file at {path}")
    if settings.audio is not None:
        read_audio(settings.audio, seconds=1.0)
    if settings.noise is not None:
        read_noise(settings.noise)
    loras = loras_of(arguments)
    progress = TerminalProgress()
    pipe = load_pipeline(
        arguments.checkpoint,
        dtype=arguments.dtype,
        loras=loras,
        offload=arguments.offload,
        keep_prompts=arguments.keep_prompts,
        progress=progress,
    )
    grid = pipe.check(settings)
    plan = pipe.plan(settings)
    facts = clip_json(arguments, loras)
    if earlier is not None:
        for name in ("checkpoint_sha256", "device", "versions"):
            if earlier.get(name) != facts[name]:
                progress.console.print(f"[yellow]{name} is not what the clip was made with: it may differ")
    progress.console.print(
        f"{settings.pipeline}: {grid.width}x{grid.height}, {grid.num_frames} frames at {grid.fps:g} fps, seed "
        f"{settings.seed}, {pipe.dtype.name} on {facts['device']}"
    )
    progress.say(plan.line())
    # What is known of the run, step by step, beside the output until the clip is written.
    replay = Replay(output.with_name(f".{output.name}.unfinished"), facts, resume=arguments.resume)
    if arguments.resume:
        progress.say(f"goes on: {replay.num_calls} model calls are there")
    watching = None if arguments.watch is None else watcher(pipe, arguments.watch, settings, grid)
    try:
        latents = pipe.generate_latents(settings, replay=replay, callback=watching)
    except ValueError:  # of what was asked for: there is nothing to go on from
        replay.remove()
        raise
    if arguments.save_latents is not None:
        save_latents(arguments.save_latents, latents)
    waveform, rate = pipe.sound(latents, settings)
    if settings.sound_only:
        write_wav(output, waveform, rate)
    else:
        frames = (frame for chunk in pipe.decode_video(latents.video) for frame in chunk)
        write_mp4(output, frames, fps=grid.fps, waveform=waveform, sample_rate_hz=rate)
    with written_whole(output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    replay.remove()
    seconds = time.monotonic() - started
    progress.console.print(
        f"wrote {output} and {output.with_suffix('.json')} in {seconds:.0f} s, "
        f"peak host memory {peak_rss_bytes() / 1e9:.1f} GB"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs; returns 0, or 2 where the arguments or files cannot be used, with the reason on standard error."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        arguments, earlier = parse_arguments(sys.argv[1:] if argv is None else argv)
        prepare(for_card=arguments.card is not None)
        run(arguments, earlier)
    except ValueError as error:
        # Every error of bad input is a ValueError whose text says what to do; a fault of ours keeps its traceback.
        if type(error).__module__.partition(".")[0] in ("ltx_jax", "hlwq_jax", "generate", "__main__", "builtins"):
            print(f"error: {error}", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
