"""Graphics cards by name, described as the compiler needs them: programs compile for a card that is not there.

    find_card("rtx4090").device()

gives a device that `jax.sharding.SingleDeviceSharding` takes for shapes to be lowered with. It compiles and tells its
memory; nothing runs on it. Source: `jax.experimental.topologies`; NVIDIA's data sheets; memory as the CUDA runtime
reports it, which is less than what is printed on the box.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

GiB = 2**30


class CardError(ValueError):
    """A card that is not known, or that nothing here can compile for."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One model of graphics card."""

    name: str
    title: str  # as the driver names it
    compute_capability: tuple[int, int]
    num_cores: int  # streaming multiprocessors
    memory_bytes: int
    bytes_per_second: float  # of its memory
    l2_bytes: int
    clock_ghz: float

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / GiB

    def target_config(self) -> str:
        """The compiler's description of the card, as a protocol buffer in text."""
        major, minor = self.compute_capability
        shared, optin, threads, fpus = _PER_CORE[self.compute_capability]
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {self.num_cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bytes_per_second:.0f}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  name: "{self.title}"
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.title}"
"""

    def device(self) -> Any:
        """A device to compile for. Raises CardError where the compiler for NVIDIA cards is not installed."""
        return _device(self.name)


# By compute capability: bytes of shared memory a core and, opted in, a block; threads a core; float32 units a core.
_PER_CORE = {
    (8, 0): (167936, 166912, 2048, 64),
    (8, 6): (102400, 101376, 1536, 128),
    (8, 9): (102400, 101376, 1536, 128),
    (9, 0): (233472, 232448, 2048, 128),
    (12, 0): (102400, 101376, 1536, 128),
}


def _card(name: str, title: str, capability: tuple[int, int], cores: int, gib: float, gbs: float, l2: int, ghz: float):
    return Card(
        name=name,
        title=title,
        compute_capability=capability,
        num_cores=cores,
        memory_bytes=int(gib * GiB),
        bytes_per_second=gbs * 1e9,
        l2_bytes=l2 * 2**20,
        clock_ghz=ghz,
    )


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("rtx3060", "NVIDIA GeForce RTX 3060", (8, 6), 28, 11.76, 360.0, 3, 1.777),
        _card("rtx3070", "NVIDIA GeForce RTX 3070", (8, 6), 46, 7.79, 448.0, 4, 1.725),
        _card("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 23.69, 936.0, 6, 1.695),
        _card("rtx4060", "NVIDIA GeForce RTX 4060", (8, 9), 24, 7.62, 272.0, 24, 2.46),
        _card("rtx4060ti16gb", "NVIDIA GeForce RTX 4060 Ti", (8, 9), 34, 15.70, 288.0, 32, 2.535),
        _card("rtx4070", "NVIDIA GeForce RTX 4070", (8, 9), 46, 11.60, 504.0, 36, 2.475),
        _card("rtx4080", "NVIDIA GeForce RTX 4080", (8, 9), 76, 15.70, 717.0, 64, 2.505),
        _card("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 23.65, 1008.0, 72, 2.52),
        _card("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 31.36, 1792.0, 96, 2.407),
        _card("a100", "NVIDIA A100-SXM4-40GB", (8, 0), 108, 39.42, 1555.0, 40, 1.41),
        _card("a100-80gb", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 79.15, 2039.0, 40, 1.41),
        _card("l40s", "NVIDIA L40S", (8, 9), 142, 44.52, 864.0, 96, 2.52),
        _card("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 79.11, 3352.0, 50, 1.98),
    )
}


def find_card(name: str) -> Card:
    """A card by name; case, blanks, dashes and the maker's name do not matter. Raises CardError with the known ones."""

    def plain(text: str) -> str:
        return re.sub(r"nvidia|geforce|[^a-z0-9]", "", text.lower())

    aliases = {plain(card.name): card for card in CARDS.values()}
    aliases |= {"rtx4060ti": CARDS["rtx4060ti16gb"]}
    aliases |= {key.removeprefix("rtx"): card for key, card in list(aliases.items())}
    aliases |= {plain(card.title): card for card in CARDS.values() if card.name != "rtx4060ti16gb"}
    found = aliases.get(plain(name))
    if found is None:
        known = ", ".join(f"{card.name} ({card.memory_gib:.0f} GiB)" for card in CARDS.values())
        raise CardError(f"there is no card {name!r} here; known are {known}")
    return found


@cache
def _device(name: str) -> Any:
    from jax.experimental import topologies

    card = CARDS[name]
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=card.target_config(), topology="1x1x1")
    except Exception as error:  # without the plug-in or its compiler, each version fails with a class of its own
        raise CardError(
            f"cannot compile for {card.title}: {error}\nThe compiler for NVIDIA cards comes with `pip install -e "
            "'.[plan]'` (no card and no driver needed), or with '.[cuda]'"
        ) from error
    return topology.devices[0]
