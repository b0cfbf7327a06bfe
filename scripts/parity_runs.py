"""Cases of plain functions (positions, rotary tables, schedules, steps, guidance) and of whole denoising runs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ltx_jax import sampling
from ltx_jax.conditioning import LatentState, audio_state, video_state
from ltx_jax.conditions import Condition, ImageCondition, Scene, States, sound
from ltx_jax.denoise import Denoiser, Pair, Prompt
from ltx_jax.geometry import (
    VideoGrid,
    audio_latent_length,
    audio_positions,
    keyframe_positions,
    unpatchify_audio,
    unpatchify_video,
    video_positions,
)
from ltx_jax.guidance import Guidance, Scales, guide
from ltx_jax.models.rope import Rotary, apply_rotary, frequency_grid, position_fractions, rotary_tables
from ltx_jax.models.upscaler import upscale
from ltx_jax.pipeline import Latents
from scripts.parity_autoencoders import channels_first, channels_last
from scripts.parity_cases import AUTOENCODER, EXACT, FORWARD, RUN, Reference, Report, call, relative
from scripts.parity_models import Models

BLANK = np.zeros((1, 1, 3), np.uint8)  # in place of an image whose latents are known

# ------------------------------------------------------------------------ rope


def _positions(models: Models, reference: Reference, name: str) -> np.ndarray | None:
    """Our positions for a name below `positions.`, or None for one that is not known."""
    scale = models.video_config.scale
    if found := re.fullmatch(r"video\.(\d+)x(\d+)x(\d+)\.fps([\d.]+)", name):
        frames, height, width = map(int, found.groups()[:3])
        return np.asarray(video_positions((frames, height, width), fps=float(found[4]), scale=scale))
    if found := re.fullmatch(r"audio\.(\d+)", name):
        return np.asarray(audio_positions(int(found[1]), models.audio_config))
    fps = float(reference.info.get("fps", 24.0))
    if found := re.fullmatch(r"keyframe\.frame(\d+)", name):
        _, height, width = _latent_grid(reference[f"positions.{name}"])
        return np.asarray(keyframe_positions((height, width), frame=int(found[1]), fps=fps, scale=scale))
    if found := re.fullmatch(r"reference\.down(\d+)\.time(\d+)", name):
        grid = _latent_grid(reference[f"positions.{name}"])
        down, stretch = map(float, found.groups())
        return np.asarray(video_positions(grid, fps=fps, scale=scale, downscale=down, time_stretch=stretch))
    return None


def _latent_grid(positions: np.ndarray) -> tuple[int, int, int]:
    """How many frames, rows and columns `b axes tokens ends` positions stand for."""
    frames, rows, columns = (len(np.unique(axis[:, 0])) for axis in positions[0])
    return frames, rows, columns


def _listed_positions(models: Models, reference: Reference, modality: str) -> np.ndarray | None:
    """Our positions of the tokens that the notes list for the rotary tables; None where they list none."""
    text = str(reference.info.get(modality, ""))
    ids = re.search(r"ids \[([\d, ]+)\]", text)
    grid = re.search(r"latent (\d+)x(\d+)x(\d+)", text)
    length = re.search(r"(\d+) frames", text)
    if ids is None:
        return None
    chosen = [int(i) for i in ids[1].split(",")]
    if grid is not None:
        frames, height, width = map(int, grid.groups())
        fps = float(reference.info.get("fps", 24.0))
        every = video_positions((frames, height, width), fps=fps, scale=models.video_config.scale)
        return np.asarray(every)[:, chosen]
    return None if length is None else np.asarray(audio_positions(int(length[1]), models.audio_config))[:, chosen]


def _fractions(models: Models, reference: Reference, table: str) -> np.ndarray | None:
    """Where in its range each token of a rotary table lies, `batch tokens axes`; None for an unknown table."""
    found = re.fullmatch(r"(video|audio)_(self|cross|connector)", table)
    if found is None:
        return None
    modality, kind = found.groups()
    if kind == "connector":
        connectors = models.connectors_config
        config = connectors.video if modality == "video" else connectors.audio
        return rearrange(reference["connector.positions"], "b axes t -> b t axes") / np.float32(config.max_pos)
    config = models.transformer_config
    stream = config.video if modality == "video" else config.audio
    middle = rearrange(reference[f"{modality}.positions"], "b axes t ends -> b t axes ends").mean(-1, dtype=np.float32)
    if kind == "cross":  # time alone, over the longer of both ranges
        seconds = max(config.video.max_pos[0], config.audio.max_pos[0])
        return np.asarray(position_fractions(jnp.asarray(middle[..., :1]), (seconds,)))
    return np.asarray(position_fractions(jnp.asarray(middle), stream.max_pos))


def run_rope(models: Models, report: Report, reference: Reference) -> None:
    theta = models.transformer_config.rope_theta
    tables: dict[str, tuple[int, Rotary]] = {}
    for name in [name.removesuffix(".cos") for name in reference.names() if name.endswith(".cos")]:
        with report.case(f"rope/{name}", reference, f"{name}."):
            fractions = _fractions(models, reference, name)
            if fractions is None:
                continue
            theirs = {part: reference[f"{name}.{part}"] for part in ("cos", "sin")}
            _, heads, _, half = theirs["cos"].shape
            dim = 2 * heads * half
            rotary = rotary_tables(jnp.asarray(fractions), dim=dim, num_heads=heads, theta=theta, dtype=jnp.float32)
            tables[name] = dim, rotary
            ours = {part: rearrange(getattr(rotary, part), "b t h half -> b h t half") for part in theirs}
            report.add(f"rope/{name}", ours, theirs, FORWARD)

    for name in reference.names("grid."):
        theirs = reference[f"grid.{name}"]
        # The width of the table of that name, or any that has as many frequencies.
        used = [t for t in tables if name in (t, f"{t}_or_cross")]
        axes = reference["video.positions"].shape[1] if used and used[0] == "video_self" else 1
        grid = frequency_grid(tables[used[0]][0] if used else 2 * len(theirs), axes, theta)
        report.add(f"rope/grid {name}", grid / theirs, np.ones_like(theirs), EXACT)

    if "apply.in" in reference:
        with report.case("rope/apply", reference, "apply."):
            x = reference["apply.in"]
            fitting = [r for dim, r in tables.values() if (x.shape[2], x.shape[1]) == (dim, r.cos.shape[1])]
            if not fitting:
                raise ValueError(f"no rotary table has {x.shape[1]} tokens and width {x.shape[2]}")
            heads = rearrange(jnp.asarray(x), "b t (h d) -> b t h d", h=fitting[0].cos.shape[2])
            ours = rearrange(apply_rotary(heads, fitting[0]), "b t h d -> b t (h d)")
            report.add("rope/apply", ours, reference["apply.out"], FORWARD)

    kinds: dict[str, list[str]] = {}
    for name in reference.names("positions."):
        kinds.setdefault(name.split(".")[0], []).append(name)
    for kind, names in kinds.items():
        with report.case(f"rope/positions {kind}", reference, f"positions.{kind}."):
            known = {k: p for k in names if (p := _positions(models, reference, k)) is not None}
            theirs = {name: reference[f"positions.{name}"] for name in known}
            ours = {name: rearrange(array, "b t axes ends -> b axes t ends") for name, array in known.items()}
            if theirs:
                size = max(relative(array) for array in theirs.values())
                report.add(f"rope/positions {kind}", ours, theirs, size)
    for modality in ("video", "audio"):
        ours = _listed_positions(models, reference, modality)
        if ours is not None and f"{modality}.positions" in reference:
            theirs = reference[f"{modality}.positions"]
            ours = rearrange(ours, "b t axes ends -> b axes t ends")
            report.add(f"rope/positions of the {modality} tables", ours, theirs, relative(theirs))


# -------------------------------------------------------------------- sampling


def _schedule(name: str) -> np.ndarray | None:
    """Our sigmas for a name, or None for one that is not known."""
    if found := re.fullmatch(r"ltx2\.(default|nostretch|tokens(\d+))\.steps(\d+)", name):
        kind, tokens, steps = found.groups()
        settings: dict[str, Any] = {"terminal": None} if kind == "nostretch" else {}
        if tokens:
            settings["num_tokens"] = int(tokens)
        return sampling.ltx2_sigmas(int(steps), **settings)
    if found := re.fullmatch(r"(linear_quadratic|beta)\.steps(\d+)", name):
        make = {"linear_quadratic": sampling.linear_quadratic_sigmas, "beta": sampling.beta_sigmas}[found[1]]
        return make(int(found[2]))
    distilled = {"stage1": sampling.DISTILLED_SIGMAS, "stage2": sampling.DISTILLED_SIGMAS_STAGE_2}
    return np.asarray(distilled[name[10:]], np.float32) if name.removeprefix("distilled.") in distilled else None


def _step(reference: Reference, name: str) -> Any | None:
    """Our result of one step of a sampler for a name, or None for one that is not known."""
    found = re.fullmatch(r"(\w+)(?:\.eta(\d+(?:_\d+)?))?\.(\d+)", name)
    if found is None or found[1] not in ("euler", "euler_ancestral", "cfgpp", "res2s_sde"):
        return None
    x, x0, unconditional, noise, sigmas = (reference[f"step.{k}"] for k in ("x", "x0", "uncond", "noise", "sigmas"))
    sigma, sigma_next = map(float, sigmas[int(found[3]) :][:2])
    settings = {"eta": float(found[2].replace("_", "."))} if found[2] else {}
    arrays = [jnp.asarray(array) for array in (x, x0, noise)]
    if found[1] == "euler":
        return sampling.euler_step(*arrays[:2], sigma, sigma_next)
    if found[1] == "euler_ancestral":
        return sampling.ancestral_step(*arrays, sigma, sigma_next, **settings)
    if found[1] == "cfgpp":
        return sampling.cfgpp_step(*arrays[:2], jnp.asarray(unconditional), arrays[2], sigma, sigma_next, **settings)
    return sampling.sde_noise_step(x, x0, noise, sigma, sigma_next, **settings)


def _guided(reference: Reference, name: str) -> Any | None:
    """Our guided estimate under the settings that the notes have for a name, or None where they have none."""
    settings = reference.info.get("guide", {}).get(name)
    if settings is None:
        return None
    parts = {"conditional": "x0", "unconditional": "uncond", "perturbed": "perturbed", "isolated": "isolated"}
    return guide(
        {name: jnp.asarray(reference[f"step.{part}"]) for name, part in parts.items()},
        Scales(
            cfg=settings.get("cfg_scale", 1.0),
            stg=settings.get("stg_scale", 0.0),
            modality=settings.get("modality_scale", 1.0),
            rescale=settings.get("rescale_scale", 0.0),
        ),
    )


def run_sampling(models: Models, report: Report, reference: Reference) -> None:
    ours: dict[str, Any] = {}
    for name in reference.names():
        with report.case(f"sampling/{name}", reference, name):
            result = _schedule(name)
            if result is None and name.startswith("res2s_coeff.h"):
                result = np.array(sampling.res2s_coefficients(float(name.removeprefix("res2s_coeff.h"))))
            if result is None and name.startswith("guide."):
                result = _guided(reference, name.removeprefix("guide."))
            if result is None:
                result = _step(reference, name)
            if result is not None:
                ours[name] = result
    groups: dict[str, list[str]] = {}
    for name in ours:
        # A row for what shares a name but for its numbers.
        groups.setdefault(re.sub(r"\.(steps\d+|stage\d|h[\d.]+|\d+)$", "", name), []).append(name)
    for group, names in groups.items():
        theirs = {name: reference[name] for name in names}
        size = max(relative(array) for array in theirs.values())
        report.add(f"sampling/{group}", {name: ours[name] for name in names}, theirs, size)


# ------------------------------------------------------------------ whole runs


class Runs:
    """The denoising runs of one file, from its noise and contexts, and what follows from them."""

    def __init__(self, models: Models, report: Report, reference: Reference):
        self.models, self.report, self.reference = models, report, reference
        info = reference.info
        self.grid = VideoGrid(
            num_frames=info["frames"],
            height=info["height"],
            width=info["width"],
            fps=float(info["fps"]),
            scale=models.video_config.scale,
        )
        context = [jnp.asarray(reference[f"in.{name}_context"]) for name in ("video", "audio")]
        self.prompt = Prompt(video=context[0], audio=context[1])
        self.noise = [jnp.asarray(reference[f"in.{name}_noise"]) for name in ("video", "audio")]
        self.sigmas = reference["in.sigmas"]

    @cached_property
    def negative(self) -> Prompt:
        context = [jnp.asarray(self.reference[f"in.neg_{name}_context"]) for name in ("video", "audio")]
        return Prompt(video=context[0], audio=context[1])

    def guidance(self, skip_step: int = 0) -> tuple[Guidance, Guidance]:
        info = self.reference.info

        def of(settings: dict[str, Any]) -> Guidance:
            return Guidance(
                cfg_scale=settings.get("cfg", 1.0),
                stg_scale=settings.get("stg", 0.0),
                modality_scale=settings.get("modality", 1.0),
                rescale=settings.get("rescale", 0.0),
                stg_blocks=tuple(settings.get("stg_blocks", info.get("stg_blocks", ()))),
                skip_step=skip_step,
            )

        return of(info["video_guidance"]), of(info["audio_guidance"])

    def states(self, *, video: Any = None, audio: Any = None, grid: VideoGrid | None = None) -> list[LatentState]:
        """Both modalities, from nothing or from latents."""
        grid, audio_config = grid or self.grid, self.models.audio_config
        channels = self.models.transformer_config.video.in_channels
        length = audio_latent_length(grid.num_frames, grid.fps, audio_config)
        return [
            video_state(grid, channels=channels, dtype=jnp.float32, latents=video),
            audio_state(length, audio_config, dtype=jnp.float32, latents=audio),
        ]

    def given(
        self, conditions: Sequence[Condition], *, frames: Sequence[Any] = (), audio: Any = None
    ) -> list[LatentState]:
        """Both modalities with conditions placed on them, which get their latents from here in place of pixels."""
        encoded = iter(frames)
        scene = Scene(grid=self.grid, encode_frames=lambda *_: next(encoded), encode_audio=lambda *_: audio)
        states: States = tuple(self.states())  # type: ignore[assignment]
        for condition in conditions:
            states = condition(scene)(states)
        video, sounding = states
        assert video is not None
        assert sounding is not None
        return [video, sounding]

    def denoise(
        self,
        name: str,
        states: list[LatentState],
        *,
        sampler: Callable[..., Pair] = sampling.euler,
        guidance: tuple[Guidance, Guidance] | None = None,
        noise: list[jax.Array] | None = None,
        sigmas: Any = None,
        grid: VideoGrid | None = None,
    ) -> Latents:
        """One run: rows for its model calls and for the latents that it gives, which are returned."""
        grid, noise, sigmas = grid or self.grid, noise or self.noise, self.sigmas if sigmas is None else sigmas
        calls: dict[str, Any] = {}

        def record(step: int, sigma: float, tokens: Pair, estimates: Pair) -> None:
            for modality in ("video", "audio"):
                calls[f"{step}.{modality}.latent"] = getattr(tokens, modality)
                calls[f"{step}.{modality}.x0"] = getattr(estimates, modality)

        predict = Denoiser(
            self.models.transformer["scan"],
            (states[0], states[1]),
            self.prompt,
            negative=self.negative if guidance else None,
            guidance=guidance,
            precision="highest",
            callback=record,
        )
        scale = float(sigmas[0])
        video, audio = (state.noised(n, scale) for state, n in zip(states, noise, strict=True))
        tokens = sampler(predict, Pair(video, audio), sigmas)
        assert tokens.video is not None
        assert tokens.audio is not None
        self.report.add(f"e2e/{name} calls", calls, self.reference.under(f"{name}.call"), RUN)
        latents = Latents(
            video=unpatchify_video(tokens.video[:, : grid.num_tokens], grid),
            audio=unpatchify_audio(tokens.audio, self.models.audio_config),
        )
        ours = {f"{m}_latent": channels_first(getattr(latents, m)) for m in ("video", "audio")}
        self.report.add(f"e2e/{name} out", ours, self.reference.under(f"{name}.out."), RUN)
        return latents

    @cached_property
    def guided(self) -> Latents:
        return self.denoise("guided", self.states(), guidance=self.guidance())

    # What a name stands for. Each is called with its name.

    def run_guided(self, name: str) -> None:
        _ = self.guided

    def run_skipping(self, name: str) -> None:
        skip_step = int(name.removeprefix("guided_skip"))
        self.denoise(name, self.states(), guidance=self.guidance(skip_step))

    def run_simple(self, name: str) -> None:
        self.denoise(name, self.states())

    def run_gradient_estimation(self, name: str) -> None:
        self.denoise(name, self.states(), sampler=sampling.gradient_estimating_euler)

    def run_res2s(self, name: str) -> None:
        count = len(self.reference.names(f"{name}.noise."))
        given = iter([jnp.asarray(self.reference[f"{name}.noise.{i}"]) for i in range(count)])

        def sampler(*args) -> Pair:
            return sampling.res_2s(*args, noise=lambda like: Pair(next(given), next(given)))

        self.denoise(name, self.states(), sampler=sampler)

    def run_i2v(self, name: str) -> None:
        """An image in place of the first latent frame, and another appended as a keyframe."""
        info, reference = self.reference.info, self.reference
        images = [
            call(self.models.video_vae, channels_last(reference[f"in.image{i}"]), method="encode") for i in range(2)
        ]
        theirs = reference.under(f"{name}.mid.")
        ours = {f"image{i}_latent": channels_first(image) for i, image in enumerate(images)}
        self.report.add(f"e2e/{name} images", ours, theirs, AUTOENCODER)
        conditions = [
            ImageCondition(image=BLANK, frame=frame, strength=strength)
            for frame, strength in ((0, info["image0_strength"]), (info["keyframe_index"], info["image1_strength"]))
        ]
        video, audio = self.given(conditions, frames=images)
        num_appended = video.initial.shape[1] - video.num_generated
        extra = jnp.asarray(reference["in.extra_noise"])[:, :num_appended]
        noise = [jnp.concatenate([self.noise[0], extra], axis=1), self.noise[1]]
        self.denoise(name, [video, audio], guidance=self.guidance(), noise=noise)

    def run_a2v(self, name: str) -> None:
        """Given audio, kept; the video follows it."""
        latents = channels_last(self.reference[f"{name}.in.audio_latent"])
        states = self.given([sound(np.zeros((1, 2), np.float32), 1)], audio=latents)
        self.denoise(name, states, guidance=(self.guidance()[0], Guidance()))

    def run_stage2(self, name: str) -> None:
        """The guided latents, upscaled and refined."""
        reference = self.reference
        named = re.search(r"((?:spatial|temporal)_x[\d_]+) upscaler", str(reference.info.get(name, "")))
        upscaler = self.models.upscaler(f"upscaler_{named[1] if named else 'spatial_x2'}")
        upscaled = upscale(upscaler, self.models.video_vae.statistics, self.guided.video)
        self.report.add(f"e2e/{name} upscaled", channels_first(upscaled), reference[f"{name}.mid.upscaled"], RUN)
        _, frames, height, width, _ = upscaled.shape
        time, row, column = self.grid.scale
        grid = replace(self.grid, num_frames=(frames - 1) * time + 1, height=height * row, width=width * column)
        states = self.states(video=upscaled, audio=self.guided.audio, grid=grid)
        noise = [jnp.asarray(reference[f"{name}.in.{m}_noise"]) for m in ("video", "audio")]
        sigmas = reference.get(f"{name}.in.sigmas")
        sigmas = sampling.DISTILLED_SIGMAS_STAGE_2 if sigmas is None else sigmas
        self.denoise(name, states, noise=noise, sigmas=sigmas, grid=grid)

    def run_decode(self, name: str) -> None:
        """The guided latents as pixels and sound."""
        models = self.models
        pixels = call(models.video_vae, self.guided.video, method="decode")
        mel = call(models.audio_vae, self.guided.audio, method="decode")
        base = call(models.vocoder, mel, method="base_waveform")
        waveform = call(models.vocoder, base, method="extend_bandwidth")
        ours = {"video_0_1": jnp.clip(pixels[0] / 2 + 0.5, 0, 1), "wav48k": waveform[0].T}
        for key, array in ours.items():
            if f"{name}.out.{key}" in self.reference:
                self.report.add(f"e2e/{name} {key}", array, self.reference[f"{name}.out.{key}"], RUN)


def run_e2e(models: Models, report: Report, reference: Reference) -> None:
    runs = Runs(models, report, reference)
    known: dict[str, Callable[[str], None]] = {
        r"guided": runs.run_guided,
        r"guided_skip\d+": runs.run_skipping,
        r"simple": runs.run_simple,
        r"gradient_estimation": runs.run_gradient_estimation,
        r"res2s": runs.run_res2s,
        r"i2v": runs.run_i2v,
        r"a2v": runs.run_a2v,
        r"stage2": runs.run_stage2,
        r"decode": runs.run_decode,
    }
    for name in reference.groups("in"):
        for pattern, run in known.items():
            if re.fullmatch(pattern, name):
                with report.case(f"e2e/{name}", reference, f"{name}."):
                    run(name)
