"""Parity of a whole release: its package is converted, and the public pipeline repeats the reference's runs.

Directories are laid out as tests/data/mini-release; `reference/index.json` says what each run was.
"""

import json
import re
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from ltx_jax import Pipeline, Prompt, Settings, load_component, load_pipeline
from ltx_jax.geometry import unpatchify_audio, unpatchify_video
from ltx_jax.pipeline import ImageCondition, Latents
from ltx_jax.settings import PipelineName
from ltx_jax.stack import module_at
from ltx_jax.text import text_contexts, text_hidden_states
from scripts.parity_cases import Reference, Row, compare, failure

# All from the README beside the reference: what disturbing inputs by 1e-6 does to the reference, with room to spare.
WEIGHT_TOLERANCE = 2**-8  # of the largest weight: bfloat16 rounding after another order of summation
SUM_TOLERANCE = 1e-3  # of the largest weight times the root of the number of terms
HIDDEN_TOLERANCE = 2e-4
CONTEXT_TOLERANCE = 1e-4
RUN_TOLERANCE = 2e-4
PASS_TOLERANCE = 5e-5  # one pass through a model: images, upscalers
FRAME_LEVELS, FRAME_FRACTION = 1, 0.01  # truncation to 8 bits turns the smallest difference into a level
BFLOAT16_FACTOR = 3  # times the rms by which the reference's own bfloat16 run differs from its float32 run

ROOT = Path(__file__).parents[1]


def run_release(directory: Path) -> list[Row]:
    """All cases of a release directory."""
    release = Release(directory)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        rows.append(release.convert(checkpoint))
        if not rows[-1].ok:
            return rows
        listed = set(release.index)
        present = {path.name for path in release.reference.glob("*.safetensors")}
        rows += [failure(name, "listed in index.json, but missing") for name in sorted(listed - present)]
        rows += [failure(name, "not listed in index.json") for name in sorted(present - listed)]
        for name in sorted(listed & present):
            stem = name.removesuffix(".safetensors")
            try:
                rows += release.run(stem, checkpoint)
            except Exception as error:  # the other files still run
                rows.append(failure(stem, f"{type(error).__name__}: {error}"))
    return rows


class Release:
    """The folders of a release directory and the pipelines made from it."""

    def __init__(self, directory: Path):
        self.reference = directory / "reference"
        self.index: dict[str, Any] = json.loads((self.reference / "index.json").read_text())
        folders = [path for path in sorted(directory.iterdir()) if path.is_dir()]
        named = {"reference", "official", "lora"}
        self.gemma = next((path for path in folders if (path / "tokenizer.json").is_file()), None)
        packages = [path for path in folders if path.name not in named and path != self.gemma]
        if len(packages) != 1:
            raise ValueError(
                f"{directory} must hold one package beside reference, lora and the text encoder; {packages}"
            )
        self.package = packages[0]
        self.loras = sorted((directory / "lora").glob("*.safetensors"))
        self.pipelines: dict[tuple, Pipeline] = {}

    def convert(self, checkpoint: Path) -> Row:
        """Runs `python -m convert` as a user would."""
        command = [sys.executable, "-m", "convert", str(self.package), str(checkpoint)]
        if self.gemma is not None:
            command += ["--gemma", str(self.gemma), "--gemma-bits", "16"]  # as the reference ran it
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        note = "" if done.returncode == 0 else (done.stderr or done.stdout)[-400:]
        return Row(case="convert", error=0.0, tolerance=0.0, ok=done.returncode == 0, note=note)

    def pipeline(self, checkpoint: Path, dtype: str = "float32", lora: float | None = None) -> Pipeline:
        """The pipeline of a compute dtype and LoRA strength; kept, so that models load and compile once."""
        key = dtype, lora
        if key not in self.pipelines:
            loras = [] if lora is None else [(path, lora) for path in self.loras]
            self.pipelines[key] = load_pipeline(checkpoint, dtype=dtype, loras=loras)
        return self.pipelines[key]

    def run(self, stem: str, checkpoint: Path) -> list[Row]:
        reference = Reference(self.reference / f"{stem}.safetensors")
        info = self.index[f"{stem}.safetensors"].get("info") or {}
        if stem == "dequantised":
            rows = self.dequantised(reference, checkpoint)
        elif stem == "text":
            rows = self.text(reference, info, self.pipeline(checkpoint))
        elif stem.startswith("gen_"):
            rows = self.generation(stem, reference, info, checkpoint)
        elif "upscaler" in stem:
            rows = self.upscaler(stem, reference, self.pipeline(checkpoint))
        else:
            return [failure(stem, "unknown file")]
        return rows + [failure(f"{stem}/{key}", f"unknown: {key}") for key in reference.unread()]

    # ----------------------------------------------------------------- weights

    def dequantised(self, reference: Reference, checkpoint: Path) -> list[Row]:
        """Every quantised matrix, as the model multiplies by it: corner, row and column sums, SHA-256."""
        facts = json.loads((self.reference / "dequantised.json").read_text())
        pipe = self.pipeline(checkpoint)
        components: dict[str, nnx.Module] = {}
        errors = {"corner": 0.0, "row_sum": 0.0, "column_sum": 0.0}
        equal, rows = 0, []
        for name, fact in facts.items():
            component, _, path = pipe.manifest.linear_names[name.removesuffix(".weight")].partition("/")
            if component not in components:
                components[component] = load_component(checkpoint, pipe.manifest, component)
            linear = module_at(components[component], path)
            plain = linear.kernel.get_value().T if isinstance(linear, nnx.Linear) else linear.dequantize()
            weight = np.asarray(plain)
            if list(weight.shape) != fact["shape"]:
                rows.append(failure(f"dequantised/{name}", f"shape {weight.shape}, expected {fact['shape']}"))
                continue
            equal += sha256(np.ascontiguousarray(weight).tobytes()).hexdigest() == fact["sha256_bf16"]
            wide = weight.astype(np.float32)
            largest = fact["max_abs"]
            ours = {"corner": wide[:4, :8], "row_sum": wide.sum(1), "column_sum": wide.sum(0)}
            for kind, array in ours.items():
                terms = {"corner": 1, "row_sum": wide.shape[1], "column_sum": wide.shape[0]}[kind]
                difference = np.abs(array - reference[f"{name}.{kind}"].astype(np.float32)).max()
                errors[kind] = max(errors[kind], float(difference / (largest * terms**0.5)))
        note = f"of the largest weight; {len(facts)} matrices, {equal} bit for bit"
        for kind, error in errors.items():
            tolerance = WEIGHT_TOLERANCE if kind == "corner" else SUM_TOLERANCE
            rows.append(
                Row(case=f"dequantised/{kind}", error=error, tolerance=tolerance, ok=error <= tolerance, note=note)
            )
        return rows

    # -------------------------------------------------------------------- text

    def text(self, reference: Reference, info: dict, pipe: Pipeline) -> list[Row]:
        """Token ids, hidden states and contexts of every prompt."""
        prompts = {f"prompt{i}": prompt for i, prompt in enumerate(info["prompts"])}
        if "negative" in info:
            prompts["negative"] = info["negative"]
        rows = []
        for name, prompt in prompts.items():
            if f"in.{name}.input_ids" not in reference:
                continue
            encoded = pipe.tokenizer.encode(prompt)
            mask = reference[f"in.{name}.attention_mask"].astype(bool)
            rows.append(compare(f"text/{name} tokens", encoded.token_ids, reference[f"in.{name}.input_ids"], 0.0))
            rows.append(compare(f"text/{name} mask", encoded.mask.astype(int), mask.astype(int), 0.0))
            token_ids, ours_mask = jnp.asarray(encoded.token_ids)[None], jnp.asarray(encoded.mask)[None]
            hidden = text_hidden_states(pipe.model("gemma"), token_ids, ours_mask, dtype=jnp.float32)
            if f"out.{name}.hidden_states" in reference:
                theirs = reference[f"out.{name}.hidden_states"]
                ours = np.asarray(hidden[:, 0])
                rows.append(compare(f"text/{name} hidden states", ours[:, mask], theirs[:, mask], HIDDEN_TOLERANCE))
            contexts = text_contexts(pipe.model("connectors"), hidden, ours_mask)
            for modality, ours in (("video", contexts.video), ("audio", contexts.audio)):
                theirs = reference[f"out.{name}.{modality}_context"]
                rows.append(compare(f"text/{name} {modality} context", ours[0], theirs[0], CONTEXT_TOLERANCE))
        return rows

    # ------------------------------------------------------------- generations

    def generation(self, stem: str, reference: Reference, info: dict, checkpoint: Path) -> list[Row]:
        """One run of the reference from its own noise: every step, the latents, frames and waveform."""
        dtype = info.get("dtype", "float32")
        source = reference
        borrowed = re.search(r"\bgen_\w+", info.get("noise", ""))
        if borrowed:
            source = Reference(self.reference / f"{borrowed[0]}.safetensors")
        pipe = self.pipeline(checkpoint, dtype, info.get("lora_strength"))
        settings, noise = self.settings(info, source)
        prompt = None
        if "in.video_context" in reference:
            contexts = {m: jnp.asarray(reference[f"in.{m}_context"]).astype(pipe.dtype) for m in ("video", "audio")}
            prompt = Prompt(**contexts)
        image = reference.get("in.image")

        judge = Judge(stem, reference, info, dtype)
        steps: dict[tuple[int, int], Any] = {}

        def keep(stage: int, step: int, sigma: float, tokens: Any, denoised: Any) -> None:
            steps[stage, step] = denoised

        latents = pipe.generate_latents(settings, prompt=prompt, image=image, noise=noise, callback=keep)
        for (stage, step), denoised in steps.items():
            prefix = f"stage{stage}.step{step}" if settings.num_stages == 2 else f"step{step}"
            for modality, tokens in zip(("video", "audio"), denoised, strict=True):
                judge.run(f"{prefix}.{modality}_x0", tokens, "x0")
        judge.latents("out.", latents)
        if settings.num_stages == 2:
            self.between_stages(pipe, settings, steps, judge)
        if "out.image_latent" in reference and image is not None:
            condition = ImageCondition(image=image)
            grid = pipe.check(settings)
            ours = pipe.encode_image(condition, height=grid.height, width=grid.width)
            judge.add("out.image_latent", rearrange(ours, "b f h w c -> b c f h w"), PASS_TOLERANCE, "image")
        if reference.names("out.frames"):
            judge.frames(np.concatenate(list(pipe.decode_video(latents.video))))
        if reference.names("out.waveform"):
            judge.waveform(pipe.decode_audio(latents.audio))
        if "out.video_latent_without_lora" in reference:
            plain = self.pipeline(checkpoint, dtype).generate_latents(settings, prompt=prompt, image=image, noise=noise)
            judge.latents("out.", plain, "_without_lora")
        return [*self.schedule(stem, settings, source), *judge.rows()]

    def settings(self, info: dict, source: Reference) -> tuple[Settings, dict[str, Any]]:
        """The settings that `generate.py` would be given for a run, and its noise."""
        two_stages = "in.stage1_video_noise" in source
        prefixes = ("stage1_", "stage2_") if two_stages else ("",)
        noise = {f"in.{p}{m}_noise": source[f"in.{p}{m}_noise"] for p in prefixes for m in ("video", "audio")}
        prompts = json.loads((self.reference / "prompts.json").read_text())
        more: dict[str, Any] = {}
        pipeline: PipelineName = "two-stage" if two_stages else "distilled"
        for modality in ("video", "audio"):
            guidance = info.get(f"{modality}_guidance")
            if not guidance:
                continue
            pipeline = pipeline if two_stages else "dev"
            for name in ("cfg_scale", "stg_scale", "modality_scale", "skip_step"):
                if name in guidance:
                    more[f"{modality}_{name}"] = guidance[name]
            more[f"{modality}_rescale"] = guidance.get("rescale_scale", 0.0)
            more["stg_blocks"] = tuple(guidance.get("stg_blocks", ()))
        if "negative" in info:
            more["negative_prompt"] = prompts.get(info["negative"], info["negative"])
        if two_stages:
            more["stage_2_sigmas"] = tuple(map(float, source["in.stage2_sigmas"]))
        prompt = info.get("prompt", 0)
        settings = Settings(
            prompt=prompts["prompts"][prompt] if isinstance(prompt, int) else prompts.get(prompt, prompt),
            pipeline=pipeline,
            width=info["width"],
            height=info["height"],
            num_frames=info["frames"],
            fps=float(info["fps"]),
            sigmas=tuple(map(float, source["in.stage1_sigmas" if two_stages else "in.sigmas"])),
            image_strength=float(info.get("strength", 1.0)),
            image_crf=None,  # the reference's image is given as the array that was encoded
            **more,
        )
        return settings, noise

    def schedule(self, stem: str, settings: Settings, source: Reference) -> list[Row]:
        """Our own schedule against the run's, where it has as many steps as ours."""
        given = np.asarray(settings.sigmas, np.float32)
        values: dict[str, Any] = {f: getattr(settings, f) for f in settings.__dataclass_fields__} | {"sigmas": None}
        if settings.guided:
            values["steps"] = len(given) - 1
        ours = Settings(**values).schedule()
        # The reference's arrays were stored as float32: one unit in the last place.
        return [compare(f"{stem}/sigmas", ours, given, 1.2e-7)] if len(ours) == len(given) else []

    def between_stages(self, pipe: Pipeline, settings: Settings, steps: dict, judge: "Judge") -> None:
        """The first stage's latents are its last estimate; the second starts from them, upscaled."""
        stages = settings.stages(pipe.configs.transformer.num_layers, pipe.check(settings))
        first = stages[0].grid(pipe.check(settings))
        last = steps[1, max(step for stage, step in steps if stage == 1)]
        latents = Latents(
            video=unpatchify_video(last.video[:, : first.num_tokens], first),
            audio=unpatchify_audio(last.audio, pipe.configs.audio_vae),
        )
        judge.latents("out.stage1_", latents)
        upscaled = rearrange(pipe.upscale(latents.video), "b f h w c -> b c f h w")
        judge.add("out.upscaled_latent", upscaled, RUN_TOLERANCE, "upscaled")

    # --------------------------------------------------------------- upscalers

    def upscaler(self, stem: str, reference: Reference, pipe: Pipeline) -> list[Row]:
        """A latent upscaler, found by what it does to the shape."""
        before, after = reference["in.latent"], reference["out.latent"]
        if after.shape[2] != before.shape[2]:
            component = "upscaler_temporal_x2"
        else:
            component = "upscaler_spatial_x2" if after.shape[3] == 2 * before.shape[3] else "upscaler_spatial_x1_5"
        ours = pipe.upscale(jnp.asarray(rearrange(before, "b c f h w -> b f h w c")), component)
        return [compare(stem, rearrange(ours, "b f h w c -> b c f h w"), after, PASS_TOLERANCE)]


class Judge:
    """Collects one run's comparisons: element by element in float32, by rms in bfloat16."""

    def __init__(self, stem: str, reference: Reference, info: dict, dtype: str):
        self.stem, self.reference = stem, reference
        self.rms = (
            {k: v["rms"] for k, v in info.get("difference_from_float32", {}).items()} if dtype != "float32" else None
        )
        self.found: dict[str, list[Row]] = {}

    def add(self, key: str, ours: Any, tolerance: float, group: str) -> None:
        if key not in self.reference:
            return
        theirs = np.asarray(self.reference[key], np.float32)
        ours = np.asarray(ours, np.float32)
        case = f"{self.stem}/{group}"
        if self.rms is None:
            row = compare(case, ours, theirs, tolerance)
        else:
            modality = "video" if "video" in key else "audio"
            allowed = BFLOAT16_FACTOR * self.rms.get(key, self.rms[f"out.{modality}_latent"])
            error = float(np.sqrt(np.mean((ours - theirs) ** 2))) if ours.shape == theirs.shape else float("nan")
            row = Row(case=case, error=error, tolerance=allowed, ok=error <= allowed, note="rms")
        self.found.setdefault(group, []).append(row)

    def run(self, key: str, tokens: Any, group: str) -> None:
        if tokens is not None:
            self.add(key, tokens, RUN_TOLERANCE, group)

    def latents(self, prefix: str, latents: Latents, suffix: str = "") -> None:
        group = f"{prefix.removeprefix('out.').replace('_', ' ')}latents{suffix.replace('_', ' ')}"
        video, audio = (
            rearrange(latents.video, "b f h w c -> b c f h w"),
            rearrange(latents.audio, "b t n c -> b c t n"),
        )
        self.add(f"{prefix}video_latent{suffix}", video, RUN_TOLERANCE, group)
        self.add(f"{prefix}audio_latent{suffix}", audio, RUN_TOLERANCE, group)

    def frames(self, frames: np.ndarray) -> None:
        for rest in self.reference.names("out.frames"):
            key = f"out.frames{rest}"
            every = _stride(key)
            theirs = np.asarray(self.reference[key]).astype(int)
            ours = frames[:, ::every, ::every].astype(int)
            if ours.shape != theirs.shape:
                row = failure(f"{self.stem}/frames", f"shape {ours.shape}, expected {theirs.shape}")
            else:
                difference = np.abs(ours - theirs)
                off, worst = float((difference > 0).mean()), float(difference.max())
                ok = worst <= FRAME_LEVELS and off < FRAME_FRACTION
                note = f"levels; {off:.2%} of values differ"
                row = Row(case=f"{self.stem}/frames", error=worst, tolerance=FRAME_LEVELS, ok=ok, note=note)
            self.found.setdefault("frames", []).append(row)

    def waveform(self, waveform: np.ndarray) -> None:
        for rest in self.reference.names("out.waveform"):
            key = f"out.waveform{rest}"
            self.add(key, waveform.T[:, :: _stride(key)], RUN_TOLERANCE, "waveform")

    def rows(self) -> list[Row]:
        """One row a group: the worst of it."""
        worst = []
        for rows in self.found.values():
            failed = [row for row in rows if not row.ok]
            worst.append(max(failed or rows, key=lambda row: row.error / max(row.tolerance, 1e-30)))
        return worst


def _stride(key: str) -> int:
    found = re.search(r"every_(\d+)", key)
    return int(found[1]) if found else 1
