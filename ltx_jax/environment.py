"""How JAX is set up for a program that makes clips; called before anything is computed."""

import os
from importlib.util import find_spec
from pathlib import Path

import jax

from ltx_jax.cache import cache_folder


def prepare(*, for_card: bool = False) -> None:
    """Memory, platform and caches; whatever the user's environment variables say comes first.

    `for_card`: nothing will run, programs are only compiled for a card that need not be there.
    """
    # Nearly all of a card's memory is for the clip, as plans count on (JAX's default is 75 %).
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")
    # The CUDA plug-in complains at length where there is no card, as on a machine that only plans.
    without_card = find_spec("jax_cuda12_plugin") is not None and not _has_card()
    if "JAX_PLATFORMS" not in os.environ and (for_card or without_card):
        jax.config.update("jax_platforms", "cpu")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _has_card() -> bool:
    """Whether an NVIDIA driver is there: on Linux, or under Windows' subsystem for it."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))
