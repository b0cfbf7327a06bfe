"""Evenly spaced frames of a clip side by side in one PNG, for looking at a clip without playing it.

python scripts/contact_sheet.py outputs/demo.mp4 docs/demo.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import tyro

from ltx_jax.media import contact_sheet, describe, read_video, write_png


def main(clip: tyro.conf.Positional[Path], output: tyro.conf.Positional[Path], *, columns: int = 5, rows: int = 1):
    """Writes the sheet and prints what a player would say of the clip."""
    write_png(output, contact_sheet(read_video(clip).frames, columns=columns, rows=rows))
    print(", ".join(f"{name} {value}" for name, value in describe(clip).items()))


if __name__ == "__main__":
    tyro.cli(main)
