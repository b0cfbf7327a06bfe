"""The tables of docs/quality.md, from what scripts/tiny/evaluate.sh measured: figures there are never typed.

A page has a comment before and behind each table, `<!-- guided -->` and `<!-- /guided -->`; what stands between is
replaced.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltx_jax.cache import written_whole
from scripts.quality.captions import WORDS
from scripts.tiny import world

# Variants of the checkpoint by the name of their folder; the release is one of them.
VARIANTS = {
    "bf16": "BF16",
    "6-scalar": "6 bits, ours (scalar)",
    "5-trellis": "5 bits, ours (trellis)",
    "5-scalar": "5 bits, ours (scalar)",
    "5-fitted": "**5 bits, fitted: the release**",
    "5-published": "5 bits, as the original packer",
    "4-scalar": "4 bits, ours (scalar)",
}
WAYS = {
    "upright": "upright: 48 x 64",
    "image": "image to video, from the first frame",
    "two-stage": "two stages: 128 x 96",
    "upscaled": "upscaled: 128 x 96",
    "seeds": "16 captions from 3 noises each",
}
HEARTS = {
    "heart": "hearts, with the LoRA",
    "heart-guided": "the same, guided",
    "heart-validation": "hearts of the validation split, with the LoRA",
    "heart-without": "hearts, without",
    "heart-others": "other shapes, with the LoRA",
    "captions-5-fitted": "other shapes, without",
    "heart-others-guided": "other shapes, guided, with the LoRA",
    "dev-5-fitted": "other shapes, guided, without",
}
# Clips of other shapes from the same noise: without the heart's LoRA, and with it.
OTHERS = {"eight steps": ("captions-5-fitted", "heart-others"), "guided": ("dev-5-fitted", "heart-others-guided")}
# Column of docs/quality.md -> key of a row; shares become percent.
SHARES = {
    "colour": "colour", "shape": "shape", "size": "size", "motion": "motion", "direction": "direction",
    "background": "background", "sound": "sound", "all words": "everything", "in step": "in_step",
}  # fmt: skip
BARS = {"colour": 0.95, "shape": 0.85, "direction": 0.95, "sound": 0.90}  # what was asked of BF16
Table = list[list[str]]


class Measurements:
    """The JSON files of a folder. What is asked for and was not measured raises ValueError."""

    def __init__(self, folder: Path):
        """Raises FileNotFoundError for a folder without any."""
        self.folder = folder
        self._files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
        if not self._files:
            raise FileNotFoundError(f"{folder} holds no measurements; scripts/tiny/evaluate.sh RUN leaves them there")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def row(self, name: str) -> Mapping[str, Any]:
        """Of a file that has one."""
        (row,) = self.rows(name).values()
        return row

    def rows(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        return self._file(name)["rows"]

    def clips(self, name: str) -> list[Mapping[str, Any]]:
        return self._file(name)["clips"]

    def _file(self, name: str) -> Mapping[str, Any]:
        if name not in self._files:
            raise ValueError(f"{self.folder} has no {name}.json; scripts/tiny/evaluate.sh RUN measures what is missing")
        return self._files[name]


def captions_table(found: Measurements, labels: Mapping[str, str], prefix: str = "") -> Table:
    """Shares of what is right, a row for each measurement that there is; at least the first must be."""
    rows = [["", "clips", *SHARES]]
    found.row(prefix + next(iter(labels)))
    for name, label in labels.items():
        if prefix + name in found:
            row = found.row(prefix + name)
            rows.append([label, str(row["clips"]), *(_percent(row[key]) for key in SHARES.values())])
    return rows


def bars_table(found: Measurements) -> Table:
    """What was asked, and how far packing moved it."""
    rows = [["bar", "asked", "BF16, guided", "to 5 bits, in points: release; original packer; ours"]]
    names = [name for name in ("dev-5-fitted", "dev-5-published", "dev-5-scalar") if name in found]
    for word, bar in BARS.items():
        whole = found.row("dev-bf16")[word]
        moved = "; ".join(f"{100 * (found.row(name)[word] - whole):+.1f}" for name in names)
        rows.append([f"{word} right", f"≥ {100 * bar:.0f} %", f"{_percent(whole)} %", moved])
    return rows


def motions_table(found: Measurements) -> Table:
    """Shapes that are right, by what they do."""
    runs = {"guided, BF16": "dev-bf16", "guided, the release": "dev-5-fitted"}
    runs |= {"eight steps, BF16": "captions-bf16", "eight steps, the release": "captions-5-fitted"}
    runs = {label: name for label, name in runs.items() if name in found}
    asked = {clip["asked"]["motion"] for name in runs.values() for clip in found.clips(name)}
    motions = [motion for motion in world.MOTIONS if motion in asked]
    rows = [["shapes that are right, of what", *(world.MOTIONS[motion] for motion in motions), "is a small star"]]
    for label, name in runs.items():
        clips = found.clips(name)
        groups = [[clip for clip in clips if clip["asked"]["motion"] == motion] for motion in motions]
        groups.append([c for c in clips if (c["asked"]["size"], c["asked"]["shape"]) == ("small", "star")])
        rows.append([label, *(f"{sum(c['right']['shape'] for c in group)} of {len(group)}" for group in groups)])
    return rows


def compare_table(found: Measurements) -> Table:
    """How far each variant is from BF16."""
    rows = [["", "velocity, first step", "velocity, all steps", "latents at the end", "SSIM", "PSNR", "mel"]]
    for name, row in found.rows("compare").items():
        shares = [100 * row[key] for key in ("velocity, first step", "velocity, all steps", "latents at the end")]
        rows.append(
            [
                VARIANTS[name], f"{shares[0]:.2f} %", f"{shares[1]:.2f} %", f"{shares[2]:.1f} %", f"{row['SSIM']:.3f}",
                f"{row['PSNR dB']:.1f} dB", f"{row['mel dB']:.2f} dB",
            ]
        )  # fmt: skip
    return rows


def coding_table(found: Measurements) -> Table:
    """What the autoencoders keep, by size."""
    words = ("colour", "shape", "motion", "sound")
    rows = [["size", "PSNR", "SSIM", "mel", *words, "click off by", "pitch with height"]]
    for size, row in found.rows("coding").items():
        rows.append(
            [
                size, f"{row['PSNR dB']:.1f} dB", f"{row['SSIM']:.3f}", f"{row['mel dB']:.2f} dB",
                *(_percent(row[word]) for word in words), f"{row['click_offset_ms']:.0f} ms",
                f"{row['pitch_correlation']:.3f}",
            ]
        )  # fmt: skip
    return rows


def changes_table(found: Measurements) -> Table:
    """Of clips of other shapes from the same noise, how many the heart's LoRA makes wrong, and how many right."""
    rows = [["", *(f"{way}: {what}" for way in OTHERS for what in ("right without, wrong with it", "the other way"))]]
    both = [[[_rights(clip) for clip in found.clips(name)] for name in names] for names in OTHERS.values()]
    for word in (*WORDS, "all words", "in step"):
        row = [word]
        for without, adapted in both:
            pairs = [(before[word], after[word]) for before, after in zip(without, adapted, strict=True)]
            row += [str(pairs.count((True, False))), str(pairs.count((False, True)))]
        rows.append(row)
    return rows


def _rights(clip: Mapping[str, Any]) -> dict[str, bool | None]:
    return {**clip["right"], "all words": all(clip["right"].values()), "in step": clip.get("in_step")}


TABLES: Mapping[str, Callable[[Measurements], Table]] = {
    "guided": lambda found: captions_table(found, VARIANTS, "dev-"),
    "eight": lambda found: captions_table(found, VARIANTS, "captions-"),
    "three": lambda found: captions_table(found, VARIANTS, "three-"),
    "bars": bars_table,
    "motions": motions_table,
    "compare": compare_table,
    "coding": coding_table,
    "ways": lambda found: captions_table(found, WAYS),
    "heart": lambda found: captions_table(found, HEARTS),
    "changes": changes_table,
}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *map(list, rows[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(page: Path, folder: Path) -> list[str]:
    """Writes every table of a page that has its comments; returns the names of those tables.

    Raises ValueError for a page without any and where a measurement that a table needs is missing, FileNotFoundError
    for a folder without measurements. The page is left as it is then.
    """
    found, text = Measurements(folder), page.read_text(encoding="utf-8")
    filled = []
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if marked.search(text):
            made = f"\n{markdown(table(found))}\n\n"
            text = marked.sub(lambda match, made=made: match[1] + made + match[2], text)
            filled.append(name)
    if not filled:
        raise ValueError(f"{page} has no comment such as <!-- {next(iter(TABLES))} --> to put a table behind")
    with written_whole(page) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    return filled


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"
