"""Teaches a converted checkpoint something new from a folder of clips: a LoRA beside packed weights, or all weights.

python finetune.py --checkpoint DIR --clips FOLDER --run RUN --width 512 --height 320 --num-frames 49
python generate.py --checkpoint DIR --lora RUN/lora.safetensors --prompt "..." --output clip.mp4

FOLDER holds clip.mp4 and clip.txt, the caption, for each clip. Latents and contexts are kept in RUN/encoded, snapshots
in RUN/snapshots: a run that was stopped goes on where it was.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro
from flax import nnx

from convert.official import write_parts
from ltx_jax.cache import written_whole
from ltx_jax.engine import Engine
from ltx_jax.environment import prepare
from ltx_jax.geometry import VideoGrid
from ltx_jax.load import load_component
from ltx_jax.progress import TerminalProgress
from ltx_jax.stack import count_layers, module_at
from ltx_jax.training.adapters import TARGETS, adapters, add_adapters, targeted, write_adapters
from ltx_jax.training.data import Examples, captioned_clips, contexts_of, encode_folder
from ltx_jax.training.flow import DenoisingModel, FlowSettings, flow_loss
from ltx_jax.training.loop import Schedule, Trainer
from ltx_jax.training.preservation import both, preserving

# Of a run that goes on: longer, slower where its loss was not finite, in less memory. All else is what it is of.
MAY_CHANGE = ("run", "steps", "save_every", "learning_rate", "accumulate")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fine-tunes the diffusion transformer of a checkpoint that `python -m convert` made."""

    checkpoint: Path
    """The converted checkpoint folder; its weights may be packed."""
    clips: Path
    """The folder of clip.mp4 and clip.txt, the caption, for each clip."""
    run: Path
    """Where the run keeps what it encodes, its snapshots, metrics.jsonl and what it learnt."""
    width: int
    """Pixels that clips are scaled to cover and cut to, in width; as of the first stage where there will be two."""
    height: int
    num_frames: int
    """The first frames of each clip, 8k + 1 of them; shorter clips are left out."""
    fps: float | None = None
    """Frames a second to read clips at; without it, those of each clip."""
    rank: int = 16
    """Of the adapters."""
    targets: str = TARGETS
    """A regular expression that published names of linears match as a whole: those get adapters. For a picture alone:
    'transformer_blocks\\.\\d+\\.(attn1|attn2|ff)\\..*'"""
    keep: Path | None = None
    """A folder like CLIPS of what the model can do and is to go on doing: nothing is learnt of its clips, but adapters
    are held to leave them as the model makes them. Clips that the model made itself will do."""
    keep_weight: float = 5.0
    """What a change of those counts beside what is learnt."""
    full: bool = False
    """Train all weights instead of adapters; they must not be packed. Leaves transformer.safetensors."""
    steps: int = 1000
    batch_size: int = 1
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    learning_rate: float = 2e-4
    caption_dropout: float = 0.1
    """The share of captions left out, which keeps guidance working."""
    precision: Annotated[str, tyro.conf.arg(metavar="DTYPE")] = "float32"
    """What the trained weights are computed in, float32 or bfloat16; their masters are float32."""
    save_every: int = 250
    seed: int = 0
    flow: FlowSettings = field(default_factory=FlowSettings)


def finetune(options: Arguments) -> Path:
    """Trains, and returns the file of what was learnt.

    Raises ValueError (MediaError and CheckpointError are such), which says what to do, before anything is trained.
    """
    progress = TerminalProgress()
    engine = Engine(options.checkpoint, progress=progress)
    scale = engine.configs.video_vae.scale
    VideoGrid(
        num_frames=options.num_frames, height=options.height, width=options.width, fps=options.fps or 1.0, scale=scale
    ).check()
    if options.full and options.keep:
        raise ValueError("--keep holds adapters to the model beneath them, which --full changes: leave out one of both")
    if options.full and engine.manifest.quantized.get("transformer"):
        raise ValueError(
            f"the transformer of {options.checkpoint} is packed, and packed weights are not trained: leave out --full "
            "for adapters beside them, or convert the official checkpoint without --quantize"
        )
    loss = flow_loss(options.flow)
    if options.keep:
        loss = preserving(loss, options.flow, weight=options.keep_weight)
    names = engine.manifest.linears_below("model.diffusion_model.", "transformer")
    if not options.full:
        targeted(names, options.targets)  # before clips are encoded
    begin(options)
    encoded = options.run / "encoded"
    size = {"width": options.width, "height": options.height, "num_frames": options.num_frames}
    folders = [options.clips] if options.keep is None else [options.clips, options.keep]
    for folder in folders:
        captioned_clips(folder)  # before any are encoded
    examples = [encode_folder(engine, folder, encoded, **size, fps=options.fps) for folder in folders]
    texts = contexts_of(engine, chain(*examples), encoded)
    engine.free()
    batches = [
        Examples(
            some, texts, engine.configs, batch_size=options.batch_size, caption_dropout=options.caption_dropout,
            seed=options.seed,
        )
        for some in examples
    ]  # fmt: skip

    cast = jnp.float32 if engine.dtype == jnp.float32 else None
    transformer = load_component(options.checkpoint, engine.manifest, "transformer", dtype=cast)
    if not options.full:
        add_adapters(transformer, names, rank=options.rank, targets=options.targets, seed=options.seed)
    schedule = Schedule(
        num_steps=options.steps, learning_rate=options.learning_rate, warmup_steps=min(100, options.steps // 10),
        accumulate=options.accumulate, precision=jnp.dtype(options.precision), save_every=options.save_every,
        log_every=min(50, options.save_every), seed=options.seed,
    )  # fmt: skip
    trainer = Trainer(
        DenoisingModel(transformer, remat=True), loss, schedule, trainable=nnx.Param if options.full else adapters
    )
    trainer.train(
        both(*batches) if options.keep else batches[0], options.run, progress=progress,
        name="all weights" if options.full else "adapters",
    )  # fmt: skip

    learnt = trainer.model().transformer
    if options.full:
        return write_transformer(options.run / "transformer.safetensors", learnt)
    facts = {"base": options.checkpoint.name, "rank": str(options.rank), "steps": str(options.steps)}
    write_adapters(options.run / "lora.safetensors", learnt, names, metadata=facts)
    return options.run / "lora.safetensors"


def begin(options: Arguments) -> None:
    """Writes down what a run is begun with. Raises ValueError where one that has snapshots was begun otherwise."""
    given = json.loads(json.dumps(asdict(options), default=lambda path: str(path.resolve())))
    said = {name: value for name, value in given.items() if name not in MAY_CHANGE}
    path = options.run / "options.json"
    if path.is_file() and any((options.run / "snapshots").glob("*")):
        before = json.loads(path.read_text(encoding="utf-8"))
        others = [f"{name} was {before.get(name)}, now {now}" for name, now in said.items() if before.get(name) != now]
        if others:
            raise ValueError(
                f"the run in {options.run} was begun with other options: {'; '.join(others)}. Give those to go on with "
                "it, or another --run"
            )
    options.run.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(said, indent=1), encoding="utf-8")


def write_transformer(path: Path, transformer: Any) -> Path:
    """All weights by their published names."""
    layers = [module_at(transformer, f"blocks.{i}") for i in range(count_layers(transformer.blocks))]
    transformer.blocks = nnx.List(layers)
    write_parts(path, {"transformer": transformer})
    return path


def main() -> None:
    """The command line: exits with 2 and one line where something is not as it must be."""
    options = tyro.cli(Arguments)
    prepare()
    try:
        path = finetune(options)
    except (ValueError, FloatingPointError) as error:
        print(f"finetune: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
