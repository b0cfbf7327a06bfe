"""What a clip needs, known before a weight is read, and the choices that follow from it.

    plan = make_plan(published_manifest(), Settings(width=1280, height=704), target=find_card("rtx4090"))
    plan.fits, plan.peak_bytes, plan.offload, plan.tile

Every stage is compiled at its real shapes (`planner`). A card need not be there: its name is enough.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.table import Table

from ltx_jax.cache import cache_folder, digest, keep_newest, source_digest, written_whole
from ltx_jax.cards import Card
from ltx_jax.checkpoint import Manifest, published_manifest
from ltx_jax.latents import latents_size
from ltx_jax.memory import free_bytes
from ltx_jax.models.attention import AttentionForm
from ltx_jax.modes import images_of, scales_of
from ltx_jax.settings import Settings
from ltx_jax.tiling import TileSize
from ltx_jax.video import probe_video

Offload = Literal["auto", "none", "blocks"]

GiB = 2**30
# Of a card's memory: the driver's context and libraries, and what an allocator cannot use between its blocks.
RESERVED_BYTES = 640 * 2**20
USABLE = 0.97

# From the reference's own to the smallest whose overlaps still hide the seams.
TILES = (
    TileSize(),
    TileSize(side=512),
    TileSize(side=512, num_frames=48),
    TileSize(side=384, num_frames=48),
    TileSize(side=256, num_frames=48),
    TileSize(side=256, num_frames=32, frame_overlap=16),
)


KEPT = 1000  # plans and measured programs in the cache
# Settings that change no shape: their values are arguments of the compiled programs.
WITHOUT_MEMORY = (
    *("prompt", "enhance", "negative_prompt", "seed", "noise", "image_crf", "steps", "sigmas", "stage_2_sigmas"),
    *("image", "audio", "video", "latents", "reference"),  # see `_given`
    *(f"{modality}_{name}" for modality in ("video", "audio") for name in ("rescale", "skip_step")),
)


class PlanError(ValueError):
    """A clip that does not fit the device, with what would."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: what lies on the device while it runs."""

    name: str
    models: tuple[str, ...]
    streamed: bool  # its layers come from host memory one by one
    argument_bytes: int  # weights and inputs
    added_bytes: int  # temporary memory and outputs
    held_bytes: int  # models of other stages that stay meanwhile
    host_bytes: int  # of host memory, beside what is being loaded
    compile_seconds: float

    @property
    def peak_bytes(self) -> int:
        return self.argument_bytes + self.added_bytes + self.held_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of a clip on one device, and the choices made for it."""

    target: str
    limit_bytes: int
    pipeline: str
    width: int
    height: int
    num_frames: int
    fps: float
    dtype: str
    stages: tuple[Stage, ...]
    offload: tuple[str, ...]  # models whose layers are streamed
    attention: AttentionForm
    tile: TileSize
    keep_models: bool  # all models fit together, so none has to make room
    checkpoint_bytes: int

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.largest.peak_bytes

    @property
    def host_bytes(self) -> int:
        return max(stage.host_bytes for stage in self.stages)

    @property
    def unhurried(self) -> bool:
        """Nothing was given up for lack of memory."""
        return not self.offload and self.tile == TILES[0] and self.keep_models

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.limit_bytes

    def line(self) -> str:
        """The plan in one line."""
        how = f"{', '.join(self.offload)} streamed" if self.offload else "all blocks resident"
        return (
            f"{self.target}: peak {self.peak_bytes / GiB:.1f} of {self.limit_bytes / GiB:.1f} GiB "
            f"({self.largest.name}), {how}, {self.attention} attention, tiles of {self.tile.side} pixels and "
            f"{self.tile.num_frames} frames"
        )

    def as_json(self) -> dict[str, Any]:
        stages = [asdict(stage) | {"peak_bytes": stage.peak_bytes} for stage in self.stages]
        facts = {"peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes, "fits": self.fits}
        return asdict(self) | {"stages": stages} | facts

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        """Inverts `as_json`. Raises TypeError or KeyError for what is not one."""
        stages = []
        for stage in content["stages"]:
            given: dict[str, Any] = {k: v for k, v in stage.items() if k != "peak_bytes"}
            given["models"] = tuple(stage["models"])
            stages.append(Stage(**given))
        values: dict[str, Any] = {k: v for k, v in content.items() if k not in ("peak_bytes", "host_bytes", "fits")}
        values["stages"] = tuple(stages)
        values["offload"] = tuple(content["offload"])
        values["tile"] = TileSize(**content["tile"])
        return cls(**values)


def usable_bytes(target: Card | jax.Device) -> int:
    """What a clip may use of a device: of a named card nearly all; of a device at hand what is free now."""
    if isinstance(target, Card):
        return int((target.memory_bytes - RESERVED_BYTES) * USABLE)
    return int(free_bytes(target) * USABLE)


def make_plan(
    manifest: Manifest,
    settings: Settings,
    *,
    target: Card | jax.Device,
    dtype: Any,
    offload: Offload = "auto",
    attention: AttentionForm = "chunked",
    limit_bytes: int | None = None,
    loras: Sequence[Path] = (),
    told: Callable[[str], None] = lambda stage: None,
) -> Plan:
    """Compiles every stage of a clip for a target and chooses what to stream and how to tile.

    `limit_bytes` is what may be used (`usable_bytes`), `loras` are files, `told` hears what is compiled
    next. Plans are kept in the user's cache folder. A plan may not fit: see `Plan.fits` and `refusal`.
    Raises CardError where the target cannot be compiled for.
    """
    from ltx_jax.planner import Planner

    limit_bytes = usable_bytes(target) if limit_bytes is None else limit_bytes
    key = digest(
        asdict(manifest) | {"provenance": None, "linear_names": None},
        {name: value for name, value in asdict(settings).items() if name not in WITHOUT_MEMORY},
        _given(settings, tuple(loras)),
        target.target_config() if isinstance(target, Card) else target.device_kind,
        (jnp.dtype(dtype).name, offload, attention),
        [(str(path), path.stat().st_size, path.stat().st_mtime) for path in loras],
        (jax.__version__, source_digest()),
    )
    # The memory of a device at hand is never the same twice: a plan that gave nothing up holds wherever it fits,
    # any other only for the limit that it was made for.
    unhurried, hurried = (cache_folder("plans") / f"{key}{limit}.json" for limit in ("", f"-{limit_bytes}"))
    for path in (unhurried, hurried):
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = Plan.from_json(json.loads(path.read_text()))
            if found.limit_bytes == limit_bytes or found.peak_bytes <= limit_bytes:
                return replace(found, limit_bytes=limit_bytes)
    plan = Planner(
        manifest,
        settings,
        target=target,
        dtype=jnp.dtype(dtype),
        offload=offload,
        attention=attention,
        limit_bytes=limit_bytes,
        loras=loras,
        told=told,
    ).plan()
    path = unhurried if plan.unhurried else hurried
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(plan.as_json()))
        keep_newest(path.parent, "*.json", KEPT)
    return plan


def plan_published(
    settings: Settings, *, target: Card | None, dtype: Any, offload: Offload, told: Callable[[str], None]
) -> Plan:
    """A plan for the published 5-bit LTX-2.3 with a packed text encoder: no checkpoint is needed."""
    settings.check()
    chosen = target or jax.devices()[0]
    on_cpu = target is None and jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    manifest = published_manifest()
    return make_plan(manifest, settings, target=chosen, dtype=dtype, offload=offload, told=told)


def plan_table(plan: Plan) -> Table:
    """A plan for people: sizes in GiB."""
    table = Table(title=f"{plan.pipeline}, {plan.width}x{plan.height}, {plan.num_frames} frames, {plan.dtype}")
    for name in ("stage", "models", "weights, inputs", "temporary", "held", "peak", "host", "compiled in"):
        table.add_column(name, justify="left" if name in ("stage", "models") else "right")
    for stage in plan.stages:
        sizes = stage.argument_bytes, stage.added_bytes, stage.held_bytes, stage.peak_bytes, stage.host_bytes
        models = ", ".join(stage.models) + (" (streamed)" if stage.streamed else "")
        table.add_row(stage.name, models, *(f"{size / GiB:.2f}" for size in sizes), f"{stage.compile_seconds:.0f} s")
    table.caption = (
        f"{plan.target}, {plan.limit_bytes / GiB:.1f} GiB usable; GiB everywhere; checkpoint on disk "
        f"{plan.checkpoint_bytes / GiB:.1f}"
    )
    return table


def refusal(make: Callable[[Settings], Plan], settings: Settings, plan: Plan, *, scale: tuple[int, int, int]) -> str:
    """Why a clip does not fit, and what would: see `nearest_sizes`. `scale` is that of the video VAE."""
    if settings.latents is not None:  # they have the size that they have
        return f"{plan.width}x{plan.height} with {plan.num_frames} frames does not fit {plan.line()}"
    near = nearest_sizes(make, settings, plan, step=scale[1] * settings.num_stages, frames=scale[0])
    sizes = [f"{s.width}x{s.height} with {s.num_frames} frames" for s in near]
    needs = f"{plan.width}x{plan.height} with {plan.num_frames} frames does not fit {plan.line()}"
    if sizes:
        return f"{needs}. What fits: {' or '.join(sizes)}"
    return f"{needs}. No smaller size fits either: a device with more free memory is needed"


def nearest_sizes(
    make: Callable[[Settings], Plan], settings: Settings, asked: Plan, *, step: int, frames: int
) -> list[Settings]:
    """Settings close to those asked for that fit: a smaller picture of the same shape, and a shorter clip.

    `make` plans settings, `asked` is the plan that did not fit; sides are multiples of `step`, frames `frames` k + 1.
    Memory grows in proportion to the number of tokens, so two plans tell where to look, and a third whether it fits.
    """
    ratio = asked.height / asked.width
    settings = replace(settings, aspect=None, megapixels=None)
    sizes = [
        replace(
            settings,
            width=width,
            height=max(round(width * ratio / step), 1) * step,
            num_frames=asked.num_frames,
        )
        for width in range(step, asked.width, step)
    ]
    lengths = [
        replace(settings, width=asked.width, height=asked.height, num_frames=count)
        for count in range(1, asked.num_frames, frames)
    ]
    volume = asked.width * asked.height * asked.num_frames
    found = []
    for choices in (sizes, lengths):
        if not choices:
            continue
        smallest = make(choices[0])
        if not smallest.fits:
            continue
        best = choices[0]
        base = _volume(best)
        slope = max(asked.peak_bytes - smallest.peak_bytes, 1) / max(volume - base, 1)
        room = (smallest.limit_bytes - smallest.peak_bytes) / slope + base
        likely = [c for c in choices[1:] if _volume(c) <= room]
        for choice in likely[: -len(likely) - 1 : -max(len(likely) // 8, 1)][:4]:
            if make(choice).fits:
                best = choice
                break
        found.append(best)
    return found


def _volume(settings: Settings) -> int:
    return (settings.width or 0) * (settings.height or 0) * (settings.num_frames or 0)


def _given(settings: Settings, loras: tuple[Path, ...]) -> list[Any]:
    """What the files that settings name mean for the shapes of a plan."""
    images = [(condition.frame, condition.strength) for _, condition in images_of(settings)]
    video = None if settings.video is None else asdict(probe_video(settings.video))
    # In latents: only that their size is the same matters here.
    latents = None if settings.latents is None else asdict(latents_size(settings.latents, (1, 1, 1), fps=1.0))
    scales = scales_of(settings, loras) if settings.reference else None
    return [images, settings.audio is not None, video, latents, scales]
