"""The sources of a conversion, wherever they lie: brought to this disk, once their headers say that it is worth it."""

from dataclasses import dataclass
from pathlib import Path

from convert.files import ConvertError, Shelf, label, open_source
from convert.hub import Hub, View
from convert.inventory import take_inventory
from convert.report import make_report
from convert.writer import refuse_incomplete


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a conversion reads, as paths of this disk."""

    source: Path
    gemma: Path | None
    upscalers: tuple[Path, ...]
    base: Path | None


def bring(
    hub: Hub,
    source: str | Path,
    *,
    gemma: str | Path | None = None,
    upscalers: tuple[str | Path, ...] = (),
    base: str | Path | None = None,
    progress: bool = False,
) -> Sources:
    """Downloads what of the sources is not here. Nothing large is downloaded of what could not be converted.

    Raises as `convert` does for sources, and ConvertError for what cannot be downloaded.
    """
    views = {word: hub.view(word) for word in (source, *upscalers, *(x for x in (gemma, base) if x is not None))}
    shelf = Shelf({path: file for view in views.values() for path, file in view.elsewhere.items()})
    found = Sources(
        source=views[source].path,
        gemma=None if gemma is None else views[gemma].path,
        upscalers=tuple(_one_file(views[word], shelf) for word in upscalers),
        base=None if base is None else views[base].path,
    )
    if not shelf.elsewhere:
        return found
    opened = open_source(found.source, gemma=found.gemma, upscalers=found.upscalers, shelf=shelf)
    lender = None if found.base is None else open_source(found.base, shelf=shelf)
    if lender is None:  # else what is missing is known when both are here: they are compared
        refuse_incomplete(make_report(take_inventory(opened)))
    needed = {*opened.file_sizes, *(opened.gemma.files if opened.gemma else ()), *(lender.files if lender else ())}
    hub.download(list(views.values()), needed, progress=progress)
    return found


def _one_file(view: View, shelf: Shelf) -> Path:
    """The file of a view, also where the repository around it was given."""
    if view.repository is None or shelf.has(view.path):
        return view.path
    files = shelf.below(view.path, "*.safetensors")
    if len(files) != 1:
        names = ", ".join(path.name for path in files[:4])
        raise ConvertError(
            f"--upscaler wants one file, {label(view.path)} has {len(files)} ({names}): give hf://OWNER/NAME/FILE"
        )
    return files[0]
