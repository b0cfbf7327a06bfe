"""One table per model, data only; and which published names belong to which model."""

from collections.abc import Mapping

from convert.mapping import Table
from convert.tables import audio_vae, connectors, gemma, transformer, upscaler, video_vae, vocoder
from ltx_jax.config import UpscalerConfig

# Component -> prefix of its published names in the main file, and the table of what lies below. The connectors' table
# has whole names, because they stand under three prefixes, two of them within the transformer's.
MAIN: Mapping[str, tuple[str, Table]] = {
    "connectors": ("", connectors.CONNECTORS),
    "transformer": ("model.diffusion_model.", transformer.TRANSFORMER),
    "video_vae": ("vae.", video_vae.VIDEO_VAE),
    "audio_vae": ("audio_vae.", audio_vae.AUDIO_VAE),
    "vocoder": ("vocoder.", vocoder.VOCODER),
}
# Shell patterns of published names that no model reads; each table says why.
SKIP: tuple[str, ...] = tuple(
    prefix + pattern
    for prefix, patterns in (("vae.", video_vae.SKIP), ("audio_vae.", audio_vae.SKIP), ("vocoder.", vocoder.SKIP))
    for pattern in patterns
)


def component_of(name: str) -> str | None:
    """The component that a published name of the main file belongs to."""
    if name.startswith(connectors.PREFIXES):
        return "connectors"
    return next((part for part, (prefix, _) in MAIN.items() if prefix and name.startswith(prefix)), None)


def table_of(component: str, upscalers: Mapping[str, UpscalerConfig]) -> tuple[str, Table]:
    """The prefix and table of any component."""
    if component == "gemma":
        return "", gemma.GEMMA
    if component in upscalers:
        return "", upscaler.UPSCALERS[upscalers[component].kind]
    return MAIN[component]
