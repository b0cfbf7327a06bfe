"""Puts the trained stages together: `python -m scripts.tiny.build official FOLDER`, later `package FOLDER RELEASE`.

`restore FOLDER RELEASE` is the way back: what was shipped, as the last stages of FOLDER, for stages that go on from
there and for `official`.

`official` writes the models as Lightricks and Google publish theirs (`ltx-2.3-tiny.safetensors`, `gemma-3-tiny`,
BF16), and converts them: to `FOLDER/checkpoint` as they are, to `FOLDER/packed` at 5 bits, by a recipe that published
layouts can hold. LoRAs are trained beside either. `package` exports the latter in the published layout, with the LoRAs
that are there.
"""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

from convert.export import export
from convert.official import write_gemma, write_official, write_parts, write_upscaler
from convert.tables import MAIN
from convert.writer import convert
from ltx_jax.environment import prepare
from scripts.tiny import release, words
from scripts.tiny.stages import CONFIGS, FINAL, read, trained

NAME = "ltx-2.3-tiny"
PACKAGE, GEMMA, LORAS = "LTX-2.3-tiny-PolarQuant-Q5", "gemma-3-tiny", "loras"
BLOCK_SIZE = 64  # layers are 96, 192 and 768 wide: blocks of 128 would be a quarter padding
QUANTIZE = ("blocks", "connectors", "projection", "adaln")
WEIGHTS = Path(__file__).parent / "weights" / "transformer-fine.safetensors"  # BF16, in no release
SHIPPED_LORAS = {"distilled": f"{NAME}-distilled-lora.safetensors", "heart": f"{NAME}-heart-lora.safetensors"}


def official(folder: Path) -> Path:
    """The models as published files, and their checkpoint folder; returns that."""
    models = {component: trained(folder, FINAL[component], component) for component in MAIN}
    write_official(folder / f"{NAME}.safetensors", models, release.METADATA)
    write_gemma(folder / GEMMA, trained(folder, FINAL["gemma"], "gemma"), release.GEMMA)
    words.write_tokenizer(folder / GEMMA)
    converted(folder, folder / "packed", quantize=QUANTIZE, recipe="fitted", block_size=BLOCK_SIZE)
    return converted(folder, folder / "checkpoint")


def converted(folder: Path, dest: Path, **options) -> Path:
    """The official files in `folder` as a checkpoint folder, packed as `options` of `convert` say."""
    upscaler = folder / f"{FINAL['upscaler_spatial_x2']}.safetensors"
    convert(
        folder / f"{NAME}.safetensors", dest, gemma=folder / GEMMA, gemma_bits=16, upscalers=(upscaler,),
        overwrite=True, **options,
    )  # fmt: skip
    return dest


def package(folder: Path, out: Path) -> None:
    """The release: the package, the text encoder and the LoRAs."""
    for name in (PACKAGE, GEMMA, LORAS):
        shutil.rmtree(out / name, ignore_errors=True)
    export(folder / "packed", out / PACKAGE, layout="V5")
    shutil.copytree(folder / GEMMA, out / GEMMA)
    (out / LORAS).mkdir(parents=True)
    for stage, name in SHIPPED_LORAS.items():
        if (folder / f"{stage}.safetensors").is_file():
            shutil.copy(folder / f"{stage}.safetensors", out / LORAS / name)
    files = [file for file in out.rglob("*") if file.is_file()]
    print(f"{out}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.2f} MB")


def restore(folder: Path, source: Path) -> None:
    """The last stage of every model as the release holds it, where `folder` has none; LoRAs are not taken over.

    The transformer and its connectors are packed in the release: theirs are the BF16 weights kept beside this code.
    """
    (upscaler,) = CONFIGS.upscalers
    files = dict.fromkeys(MAIN, source / PACKAGE / "bf16" / "model_bf16.safetensors") | {
        "transformer": WEIGHTS,
        "connectors": WEIGHTS,
        "gemma": source / GEMMA / "model.safetensors",
        upscaler: source / PACKAGE / "upscalers" / f"{upscaler}.safetensors",
    }
    stages: dict[str, list[str]] = {}
    for component in files:
        stages.setdefault(FINAL[component], []).append(component)
    for stage, components in stages.items():
        path = folder / f"{stage}.safetensors"
        if path.exists():
            continue
        models = {component: read(files[component], component) for component in components}
        if upscaler in models:
            write_upscaler(path, models[upscaler], release.UPSCALER)
        else:
            write_parts(path, models)
        print(f"wrote {path}")


def main(
    what: Annotated[Literal["official", "package", "restore"], tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional] = Path("release"),
) -> None:
    """Writes the trained models as published files, or as the release; or a release as trained models."""
    prepare()
    match what:
        case "official":
            print(f"wrote {official(folder)}")
        case "package":
            package(folder, out)
        case "restore":
            restore(folder, out)


if __name__ == "__main__":
    tyro.cli(main)
