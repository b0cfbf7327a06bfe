"""The command line: `python -m convert SOURCE DEST [--gemma DIR]` and `python -m convert inspect SOURCE [--json]`."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from convert.files import ConvertError
from convert.quantizing import BITS, OPTIONAL, RECIPE
from convert.report import inspect, to_text
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

    `python -m convert inspect SOURCE` tells what a source holds, without converting it.
    """

    source: Positional[Path]
    """The package folder (5-bit HLWQ), or an official checkpoint file."""
    dest: Positional[Path]
    """The folder to make."""
    gemma: Path | None = None
    """Gemma 3 in the Hugging Face layout; without it the checkpoint cannot read prompts."""
    upscaler: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A latent upscaler that lies elsewhere; may be given several times."""
    gemma_bits: int = BITS
    """Bits a weight of the text encoder's linears, 2 to 8; 16 leaves them as they are."""
    quantize: str = ""
    """What else to pack at 5 bits, separated by commas: blocks, connectors, projection, adaln; by default nothing. As
    `--quantize` alone: blocks."""
    bits: str = ""
    """Bits of some linears, as 'blocks.0=8,blocks.43-47=6,*=5': the first that fits holds; 16 leaves a linear as it is.
    """
    recipe: str = RECIPE
    """How to pack: scalar; trellis (least error, slow on a CPU); or published, which other programs can read."""
    overwrite: bool = False
    """Replace a finished checkpoint at DEST."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Tells what a source holds, from headers and a sample of codes: layout, codebook, coverage, what is missing."""

    source: Positional[Path]
    """The package folder, or a checkpoint file."""
    gemma: Path | None = None
    """Gemma 3 in the Hugging Face layout, if it lies elsewhere."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str] | None = None) -> int:
    """Runs; returns 0, or 2 for a source or destination that is refused, with the reason on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    prepare()
    try:
        if argv[:1] == ["inspect"]:
            asked = tyro.cli(Inspect, args=argv[1:], prog="python -m convert inspect")
            report = inspect(asked.source, gemma=asked.gemma)
            print(
                json.dumps(asdict(report) | {"complete": report.complete}, indent=1) if asked.json else to_text(report)
            )
            return 0
        chosen = tyro.cli(Convert, args=_with_groups(argv), prog="python -m convert")
        convert(
            chosen.source,
            chosen.dest,
            gemma=chosen.gemma,
            upscalers=chosen.upscaler,
            gemma_bits=chosen.gemma_bits,
            quantize=[group.strip() for group in chosen.quantize.split(",") if group.strip()],
            bits=chosen.bits,
            recipe=chosen.recipe,
            overwrite=chosen.overwrite,
            progress=True,
        )
        print(f"wrote {chosen.dest}")
        if chosen.gemma is None:
            print("note: without --gemma a checkpoint has no text encoder, unless one lay inside SOURCE")
    except (ConvertError, FormatError, ConfigError, CheckpointError, TextError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
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
