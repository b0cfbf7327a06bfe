"""Compiles for a named card that need not be there, and reads what came out: kernels, arrays, registers."""

import importlib.util
import inspect
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from ltx_jax.cards import find_card

needs_card_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="compiling for a card needs no card, but the packages jax-cuda12-plugin and nvidia-cuda-nvcc-cu12",
)

# By compute capability, a card that Pallas-Triton in jax 0.12 knows by name.
_KNOWN_TO_PALLAS = {
    (8, 0): "NVIDIA A100",
    (8, 6): "NVIDIA A10",
    (8, 9): "NVIDIA L4",
    (9, 0): "NVIDIA H100",
    (12, 0): "NVIDIA RTX PRO 6000",
}


def compile_for(card_name: str, f: Callable[..., Any], *args: Any, ptx_folder: Path | None = None) -> Any:
    """`f` compiled for a card (`ltx_jax.cards`), for arguments of the shapes and dtypes of `args`.

    `ptx_folder` receives the kernels' PTX, for `register_use`.
    """
    card = find_card(card_name)
    sharding = SingleDeviceSharding(card.device())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    options = {} if ptx_folder is None else {"xla_dump_to": str(ptx_folder), "xla_dump_emitter_re": "ptx"}
    # Without a card at hand Pallas-Triton of jax 0.12 asks the mesh which one is meant; 0.10 does not ask.
    kind: dict[str, Any] = {"device_kind": _KNOWN_TO_PALLAS[card.compute_capability], "num_cores": card.num_cores}
    if "platform" in inspect.signature(AbstractDevice.__init__).parameters:
        kind["platform"] = "cuda"
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(**kind))):
        return jax.jit(f).lower(*shapes).compile(compiler_options=options)


@dataclass(frozen=True)
class Buffer:
    """One array that a kernel writes."""

    dtype: str  # as HLO says it: f32, bf16, u32
    shape: tuple[int, ...]
    kernel: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Kernel:
    """One launch, or one copy."""

    name: str
    opcode: str
    target: str  # of a custom call, else empty
    multiplies: bool  # a matrix product, by a library or by a generated kernel
    outputs: tuple[Buffer, ...]


def kernels(text: str) -> list[Kernel]:
    """What a program (`compiled.as_text()`) launches, in the order of its schedule.

    Kernels of loops and branches are listed where these are run, once. What lies inside a fusion is not listed: it
    never reaches memory. What runs asynchronously is listed where it is done.
    """
    computations = _computations(text)
    return [_kernel(line, computations) for line in _launches("ENTRY", computations)]


def buffers(text: str) -> list[Buffer]:
    """Every array that the kernels of a program write, in the order of `kernels`."""
    return [buffer for kernel in kernels(text) for buffer in kernel.outputs]


# What writes nothing of its own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency",
    "partition-id", "replica-id",
}  # fmt: skip
_NESTED = {"while", "call", "conditional"}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*\)|\S+) ([a-z][a-z\-]*)\(")
_RUN = re.compile(r"(?:condition|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def _computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation by its name, which for the entry is ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            lines = found["ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")] = []
        elif _INSTRUCTION.match(line):
            lines.append(line)
    if "ENTRY" not in found:
        raise ValueError("expected the text of a compiled program, with an ENTRY computation")
    return found


def _parts(line: str) -> tuple[str, str, str]:
    """Name, type and opcode of an instruction."""
    match = _INSTRUCTION.match(line)
    assert match is not None
    name, written, opcode = match.groups()
    return name, written, opcode


def _launches(computation: str, computations: dict[str, list[str]]) -> Iterator[str]:
    for line in computations[computation]:
        opcode = _parts(line)[2]
        if opcode in _NESTED:
            run = _RUN.findall(line)
            for branches in _BRANCHES.findall(line):
                run += [branch.strip(" %") for branch in branches.split(",")]
            for name in run:
                yield from _launches(name, computations)
        elif opcode not in _FREE and not opcode.endswith(("-start", "-update")):
            yield line


def _kernel(line: str, computations: dict[str, list[str]]) -> Kernel:
    name, written, opcode = _parts(line)
    target = re.search(r'custom_call_target="([^"]*)"', line)
    arrays = [(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in _ARRAY.findall(written)]
    return Kernel(
        name=name,
        opcode=opcode,
        target=target[1] if target else "",
        multiplies=_multiplies(line, computations),
        outputs=tuple(Buffer(dtype, shape, name) for dtype, shape in arrays),
    )


def _multiplies(line: str, computations: dict[str, list[str]]) -> bool:
    inner = [step for called in _CALLS.findall(line) for step in computations.get(called, [])]
    return _parts(line)[2] == "dot" or "__cublas" in line or any(_multiplies(step, computations) for step in inner)


@dataclass(frozen=True)
class RegisterUse:
    registers: int  # a thread
    spilled_bytes: int  # a thread, to local memory


def register_use(ptx_folder: Path) -> dict[str, RegisterUse]:
    """By kernel name, what NVIDIA's assembler makes of the PTX that `compile_for` left. Skips the test without it."""
    found: dict[str, RegisterUse] = {}
    for path in sorted(ptx_folder.glob("*.ptx")):
        ptx = path.read_text()
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        assert target is not None
        command = [_ptxas(), "-v", f"-arch={target[1]}", str(path), "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for name, report in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):
            registers = re.search(r"Used (\d+) registers", report)
            spilled = re.search(r"(\d+) bytes spill stores", report)
            assert registers is not None
            assert spilled is not None
            found[name] = RegisterUse(int(registers[1]), int(spilled[1]))
    return found


def _ptxas() -> str:
    spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / "bin" / "ptxas"
        if path.exists():
            return str(path)
    on_path = shutil.which("ptxas")
    if on_path is None:
        pytest.skip("counting registers needs ptxas, from nvidia-cuda-nvcc-cu12 or the CUDA toolkit")
    return on_path
