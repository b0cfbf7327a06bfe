"""Puts the trained stages together: `python -m scripts.tiny.build official FOLDER`, later `package FOLDER RELEASE`.

`official` writes the models as Lightricks and Google publish theirs (`ltx-2.3-tiny.safetensors`, `gemma-3-tiny`,
BF16), and converts them: to `FOLDER/checkpoint` as they are, to `FOLDER/packed` at 5 bits by the published recipe.
LoRAs are trained beside either. `package` exports the latter in the published layout, with the LoRAs that are there.
"""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

from convert.export import export
from convert.official import write_gemma, write_official
from convert.tables import MAIN
from convert.writer import convert
from ltx_jax.environment import prepare
from scripts.tiny import release, words
from scripts.tiny.stages import FINAL, trained

NAME = "ltx-2.3-tiny"
PACKAGE, GEMMA, LORAS = "LTX-2.3-tiny-PolarQuant-Q5", "gemma-3-tiny", "loras"
BLOCK_SIZE = 64  # layers are 96, 192 and 768 wide: blocks of 128 would be a quarter padding
QUANTIZE = ("blocks", "connectors", "projection", "adaln")
SHIPPED_LORAS = {"distilled": f"{NAME}-distilled-lora.safetensors", "heart": f"{NAME}-heart-lora.safetensors"}


def official(folder: Path) -> Path:
    """The models as published files, and their checkpoint folder; returns that."""
    models = {component: trained(folder, FINAL[component], component) for component in MAIN}
    write_official(folder / f"{NAME}.safetensors", models, release.METADATA)
    write_gemma(folder / GEMMA, trained(folder, FINAL["gemma"], "gemma"), release.GEMMA)
    words.write_tokenizer(folder / GEMMA)
    converted(folder, folder / "packed", quantize=QUANTIZE, recipe="published", block_size=BLOCK_SIZE)
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


def main(
    what: Annotated[Literal["official", "package"], tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional] = Path("release"),
) -> None:
    """Writes the trained models as published files, or as the release."""
    prepare()
    if what == "official":
        print(f"wrote {official(folder)}")
    else:
        package(folder, out)


if __name__ == "__main__":
    tyro.cli(main)
