"""The command line: `python -m convert SOURCE DEST`, and inspect SOURCE, verify DEST and export DEST OUT."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from convert.export import Export, run_export
from convert.files import ConvertError, OnlyLoras, Shelf
from convert.hub import Hub
from convert.loras import describe_loras, lora_text
from convert.quantizing import BITS, BLOCK_SIZE, OPTIONAL, RECIPE
from convert.report import fetched_text, inspect, to_text
from convert.sources import bring
from convert.verify import Verify, run_verify
from convert.writer import convert
from hlwq_jax import FormatError
from ltx_jax.checkpoint import CheckpointError
from ltx_jax.config import ConfigError
from ltx_jax.environment import prepare
from ltx_jax.text import TextError

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Converts a published package or checkpoint into a folder that generate.py reads.

    `python -m convert inspect SOURCE` tells what a source holds, without converting it; `verify DEST` proves that a
    folder is what its conversion wrote; `export DEST OUT` writes the published files back.
    """

    source: Positional[str]
    """The package folder (5-bit HLWQ), or an official checkpoint file; or a repository of the Hugging Face Hub, as
    OWNER/NAME[@REVISION], or a file or folder of one, as hf://OWNER/NAME[@REVISION]/PATH. So for the flags below."""
    dest: Positional[Path]
    """The folder to make."""
    gemma: str | None = None
    """Gemma 3 in the Hugging Face layout; without it the checkpoint cannot read prompts."""
    upscaler: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A latent upscaler that lies elsewhere; may be given several times."""
    base: str | None = None
    """The official checkpoint that SOURCE was made from: what SOURCE lacks is taken from there, packed as SOURCE packs.
    """
    gemma_bits: int = BITS
    """Bits a weight of the text encoder's linears, 2 to 8; 16 leaves them as they are."""
    quantize: str = ""
    """What else to pack at 5 bits, separated by commas: blocks, connectors, projection, adaln; by default nothing. As
    `--quantize` alone: blocks."""
    bits: str = ""
    """Bits of some linears, as 'blocks.0=8,blocks.43-47=6,*=5': the first that fits holds; 16 leaves a linear as it is.
    """
    recipe: str = RECIPE
    """How to pack: scalar; trellis (least error, slow on a CPU); or as other programs can read it: published, which is
    what their packer does, or fitted, with norms that come closer."""
    block_size: int = BLOCK_SIZE
    """Weights of a row that are packed together, with one norm: 128, as published; 64 or 32 for narrow models."""
    overwrite: bool = False
    """Replace a finished checkpoint at DEST."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Tells what a source holds, from headers and a sample of codes: layout, codebook, coverage, what is missing."""

    source: Positional[str]
    """The package folder, a checkpoint or LoRA file, a repository (OWNER/NAME[@REVISION]), a file or folder of one
    (hf://OWNER/NAME[@REVISION]/PATH) or an address (https://...). What is not here is not downloaded."""
    gemma: str | None = None
    """Gemma 3 in the Hugging Face layout, if it lies elsewhere."""
    base: str | None = None
    """The official checkpoint that is to fill what SOURCE lacks."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code, or 2 for what is refused, with the reason on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    prepare()
    try:
        command, rest = argv[:1], argv[1:]
        if command == ["inspect"]:
            return run_inspect(tyro.cli(Inspect, args=rest, prog="python -m convert inspect"))
        if command == ["verify"]:
            return run_verify(tyro.cli(Verify, args=rest, prog="python -m convert verify"))
        if command == ["export"]:
            return run_export(tyro.cli(Export, args=rest, prog="python -m convert export"))
        return run_convert(tyro.cli(Convert, args=_with_groups(argv), prog="python -m convert"))
    except (ConvertError, FormatError, ConfigError, CheckpointError, TextError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def run_inspect(options: Inspect) -> int:
    """Prints the report of a source; returns 0."""
    words = {name: getattr(options, name) for name in ("source", "gemma", "base") if getattr(options, name) is not None}
    views = {name: Hub().view(word) for name, word in words.items()}
    shelf = Shelf({path: file for view in views.values() for path, file in view.elsewhere.items()})
    try:
        paths = {name: view.path for name, view in views.items()}
        report = inspect(paths["source"], gemma=paths.get("gemma"), base=paths.get("base"), shelf=shelf)
    except OnlyLoras as found:
        loras, fetched = describe_loras(found.loras), shelf.fetched
        if options.json:
            print(json.dumps({"loras": [asdict(x) for x in loras], "fetched": fetched and asdict(fetched)}, indent=1))
        else:
            print("\n\n".join([*map(lora_text, loras), *([fetched_text(fetched)] if fetched else [])]))
        return 0
    print(json.dumps(asdict(report) | {"complete": report.complete}, indent=1) if options.json else to_text(report))
    return 0


def run_convert(options: Convert) -> int:
    """Converts and says what was written; returns 0."""
    here = bring(
        Hub(), options.source, gemma=options.gemma, upscalers=options.upscaler, base=options.base, progress=True
    )
    manifest = convert(
        here.source,
        options.dest,
        gemma=here.gemma,
        upscalers=here.upscalers,
        base=here.base,
        gemma_bits=options.gemma_bits,
        quantize=[group.strip() for group in options.quantize.split(",") if group.strip()],
        bits=options.bits,
        recipe=options.recipe,
        block_size=options.block_size,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"wrote {options.dest}")
    if manifest.gemma_metadata is None:
        print("note: without --gemma a checkpoint has no text encoder, unless one lay inside SOURCE")
    return 0


def _with_groups(argv: list[str]) -> list[str]:
    """With the groups that `--quantize` alone means."""
    done = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        done.append(word)
        named = {group.strip() for group in following.split(",")}
        if word == "--quantize" and not named & set(OPTIONAL):
            done.append("blocks")
    return done


if __name__ == "__main__":
    sys.exit(main())
