"""Prompt to clip on the command line: arguments in, one pipeline call, files out.

python generate.py --checkpoint DIR --prompt "a heron lands on still water" --output heron.mp4
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from ltx_jax.cache import written_whole
from ltx_jax.cards import find_card
from ltx_jax.clip import Callback, Clip, latents_of
from ltx_jax.config import VideoVAEConfig
from ltx_jax.denoise import Pair
from ltx_jax.environment import prepare
from ltx_jax.geometry import VideoGrid
from ltx_jax.latents import Latents, save_latents
from ltx_jax.lora import Lora
from ltx_jax.media import Frames, check_writable, read_audio, read_image, read_video, write_mp4, write_png, write_wav
from ltx_jax.memory import peak_rss_bytes
from ltx_jax.modes import images_of
from ltx_jax.noise import read_noise
from ltx_jax.pictures import evenly_spaced_numbers, sheet_of
from ltx_jax.pipeline import Pipeline, load_pipeline
from ltx_jax.plan import Offload, Plan, plan_published, plan_table, refusal
from ltx_jax.presets import LTX_2_3
from ltx_jax.preview import kept_factors, preview, write_preview
from ltx_jax.progress import TerminalProgress
from ltx_jax.record import changes, facts_of, is_made, read_record, recorded_settings
from ltx_jax.replay import Replay
from ltx_jax.settings import Settings
from ltx_jax.several import Task, parse_seeds, read_prompts, tasks_of

SHEET_COLUMNS = 4


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
    prompts: Path | None = None
    """Several clips: a file with a prompt a line, or JSON: a list of prompts, or of objects whose keys are settings.
    Clips are named after the output; a sheet of all of them is written beside it as .png."""
    seeds: str | None = None
    """Several clips: each prompt with each of these seeds, as 1-8 or 1,3,10-12."""
    watch: Path | None = None
    """Keep a small animation of the clip in this file (.png or .gif) while it is denoised, new at every step. A preview
    has one beside its output."""
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


def parse_arguments(argv: list[str]) -> tuple[Arguments, dict[str, Any] | None]:
    """The arguments, those of an earlier clip filled in below those given."""
    earlier = None
    for index, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == "--from":
            if not value and index + 1 == len(argv):
                break
            earlier = read_record(Path(value or argv[index + 1]))
    if earlier is None:
        return tyro.cli(Arguments, args=argv), None
    settings = recorded_settings(earlier)
    if settings.preview and "--refine" in argv:  # what a preview is made for: its latents, at full size
        settings = replace(settings, preview=False, latents=Path(earlier["kept_latents"]))
    default = Arguments(
        checkpoint=Path(earlier["checkpoint"]), settings=settings, lora=tuple(earlier["lora"]), dtype=earlier["dtype"]
    )
    return tyro.cli(Arguments, args=argv, default=default), earlier


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
    stages = {stage.number: stage for stage in settings.stages(pipe.configs.transformer.num_layers, grid)}

    def show(stage: int, step: int, sigma: float, tokens: Pair, denoised: Pair) -> None:
        if denoised.video is None:
            return
        size = stages[stage].grid(grid)
        # The windows of a clip that is extended are shorter than its beginning.
        frames = min(denoised.video.shape[1] // (size.latent_height * size.latent_width), size.latent_frames)
        size = replace(size, num_frames=(frames - 1) * size.scale[0] + 1)
        write_preview(path, preview(latents_of(pipe, denoised, size).video, factors), fps=grid.fps / grid.scale[0])

    return show


def check_files(arguments: Arguments, tasks: list[Task]) -> None:
    """Raises for what cannot be read or written: before models are loaded, not after."""
    for task in tasks:
        settings, output = task.settings, task.output
        if output.suffix.lower() not in (".mp4", ".wav"):
            raise UsageError(f"the output must end in .mp4, or in .wav for the sound alone, got {output}")
        if settings.sound_only and output.suffix.lower() != ".wav":
            raise UsageError(f"--sound-only makes no picture: the output must end in .wav, got {output}")
        for path in (output, output.with_suffix(".json")):
            check_writable(path)
        for path, _ in images_of(settings):
            read_image(path)
        for path in (settings.audio, settings.video, settings.reference, settings.latents):
            if path is None:
                continue
            if not path.is_file():
                raise UsageError(f"there is no file at {path}")
            if path.resolve() == output.resolve():
                raise UsageError(f"the output {output} is what the clip is made from; give it another name")
        if settings.audio is not None:
            read_audio(settings.audio, seconds=1.0)
        if settings.noise is not None:
            read_noise(settings.noise)
    if arguments.save_latents is not None:
        if len(tasks) > 1:
            raise UsageError("--save-latents names one file; it is for one clip")
        if tasks[0].settings.extend is not None:
            raise UsageError(
                "--save-latents: a clip that is extended has no latents of its own, but one for each window"
            )
        check_writable(arguments.save_latents)
    if arguments.watch is not None:
        check_writable(arguments.watch, suffixes=(".png", ".gif"))


def tasks_of_call(arguments: Arguments) -> list[Task]:
    """The clips that a call asks for."""
    settings = arguments.settings
    if arguments.prompts is None and arguments.seeds is None:
        return [Task(settings=settings, output=arguments.output, label=settings.prompt)]
    if arguments.prompts is not None and settings.prompt:
        raise UsageError("--prompts gives the prompts; leave out --prompt")
    seeds = None if arguments.seeds is None else parse_seeds(arguments.seeds)
    prompts = [settings] if arguments.prompts is None else read_prompts(arguments.prompts, settings)
    return tasks_of(prompts, seeds, arguments.output)


@dataclass
class Run:
    """One clip on its way."""

    task: Task
    grid: VideoGrid
    plan: Plan
    facts: dict[str, Any]
    keep: Path | None  # where its latents are kept
    replay: Replay | None = None  # what is known of it, step by step, beside the output until the clip is written
    made: Latents | Clip | None = None
    shown: Frames | None = None  # some frames, for a sheet


def same_shape(one: Settings, other: Settings) -> bool:
    """Whether the same plan holds for both."""
    return replace(one, prompt="", seed=0) == replace(other, prompt="", seed=0)


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
    tasks = tasks_of_call(arguments)
    check_files(arguments, tasks)
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
    runs = []
    for task in tasks:
        grid = pipe.check(task.settings)
        alike = (run.plan for run in runs if same_shape(run.task.settings, task.settings))
        plan = next(alike, None) or pipe.plan(task.settings)
        keep = task.output.with_suffix(".safetensors") if task.settings.preview else arguments.save_latents
        runs.append(Run(task, grid, plan, facts_of(task.settings, pipe, arguments.dtype, kept_latents=keep), keep))
    if earlier is not None:
        for name in changes(earlier, runs[0].facts):
            progress.console.print(f"[yellow]{name} is not what the clip was made with: it may differ")
    several = len(runs) > 1
    todo = [run for run in runs if not (several and arguments.resume and is_made(run.task.output, run.facts))]
    if len(todo) < len(runs):
        progress.say(f"{len(runs) - len(todo)} of {len(runs)} clips are there already")
    for run in todo:
        folder = run.task.output.with_name(f".{run.task.output.name}.unfinished")
        resume = arguments.resume and (folder.is_dir() or not several)
        run.replay = Replay(folder, run.facts, resume=resume)
    try:
        make(pipe, arguments, todo)
    except ValueError:  # of what was asked for: nothing is left that nobody could go on from
        for run in todo:
            if run.replay is not None and not run.replay.num_calls:
                run.replay.remove()
        raise
    for run in todo:
        if run.made is not None:
            if several:
                pipe.adopt(run.plan)
            write(pipe, run)
    if several and not runs[0].task.settings.sound_only:
        sheet = arguments.output.with_suffix(".png")
        clips = [run.shown if run.shown is not None else read_video(run.task.output).frames for run in runs]
        write_png(sheet, sheet_of(clips, [run.task.label for run in runs], columns=SHEET_COLUMNS))
        progress.console.print(f"wrote {sheet}: {SHEET_COLUMNS} frames of each clip")
    seconds = time.monotonic() - started
    outputs = [str(run.task.output) for run in todo]
    if outputs:
        beside = "it" if len(outputs) == 1 else "each"
        progress.console.print(
            f"wrote {', '.join(outputs)} and beside {beside} its .json in {seconds:.0f} s, "
            f"peak host memory {peak_rss_bytes() / 1e9:.1f} GB"
        )
    if tasks[0].settings.preview and len(tasks) == 1:
        record = tasks[0].output.with_suffix(".json")
        progress.console.print(f"at full size: python generate.py --from {record} --refine --output FILE.mp4")


def make(pipe: Pipeline, arguments: Arguments, runs: list[Run]) -> None:
    """The latents of each clip, or the whole clip where it is made in windows: that is written at once."""
    progress = pipe.progress
    contexts = pipe.contexts_of([run.task.settings for run in runs])
    for number, (run, (positive, negative)) in enumerate(zip(runs, contexts, strict=True), 1):
        settings, grid = run.task.settings, run.grid
        progress.say(
            (f"{number} of {len(runs)}: " if len(runs) > 1 else "")
            + f"{settings.pipeline}: {grid.width}x{grid.height}, {grid.num_frames} frames at {grid.fps:g} fps, seed "
            f"{settings.seed}, {pipe.dtype.name} on {run.facts['device']}"
        )
        progress.say(run.plan.line())
        if len(runs) > 1:
            pipe.adopt(run.plan)
        if arguments.resume and run.replay is not None:
            progress.say(f"goes on: {run.replay.num_calls} model calls are there")
        watch = arguments.watch or (run.task.output.with_suffix(".png") if settings.preview else None)
        watching = None if watch is None else watcher(pipe, watch, settings, grid)
        denoise = pipe.generate_latents if settings.extend is None else pipe.extend
        run.made = denoise(settings, prompt=positive, negative=negative, replay=run.replay, callback=watching)
        if isinstance(run.made, Clip):
            write(pipe, run)


def write(pipe: Pipeline, run: Run) -> None:
    """The files of a clip: the clip, its latents if they are to be kept, and last its .json. Then it is done with."""
    settings, output = run.task.settings, run.task.output
    assert run.made is not None
    assert run.replay is not None
    if isinstance(run.made, Clip):
        waveform, rate, fps = run.made.waveform, run.made.sample_rate_hz, run.made.fps
        frames, total = iter(run.made.frames), len(run.made.frames)
    else:
        if run.keep is not None:
            save_latents(run.keep, run.made, fps=run.grid.fps)
        waveform, rate = pipe.sound(run.made, settings)
        size = settings.finished(run.grid)
        fps, total = size.fps, size.num_frames
        frames = (frame for chunk in pipe.decode_video(run.made.video) for frame in chunk)
    if settings.sound_only:
        write_wav(output, waveform, rate)
    else:
        picks = set(evenly_spaced_numbers(total, SHEET_COLUMNS).tolist())
        shown = []

        def passed() -> Iterator[Any]:
            for number, frame in enumerate(frames):
                if number in picks:
                    shown.append(frame)
                yield frame

        write_mp4(output, passed(), fps=fps, waveform=waveform if len(waveform) else None, sample_rate_hz=rate)
        run.shown = np.stack(shown)
    with written_whole(output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(run.facts, indent=1) + "\n")
    run.replay.remove()
    run.made = None


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
