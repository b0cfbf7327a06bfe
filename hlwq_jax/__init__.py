"""HLWQ (PolarQuant) quantized weights for any JAX model: read, write, and multiply straight from packed codes."""

from hlwq_jax.codebook import TABLES, TableName, lloyd_max
from hlwq_jax.fused import FusedCheck, check_fused, fused_supports, fused_weight
from hlwq_jax.hadamard import hadamard_matrix, hadamard_transform
from hlwq_jax.linear import Packed, QuantizedLinear, quantize_linears, replace_linears, set_form
from hlwq_jax.matmul import FORMS, Form, choose_form, dequantize_planes, quantized_matmul
from hlwq_jax.names import ResolvedStems, mangle, resolve_stems
from hlwq_jax.packing import Packing, pack, packed_length, unpack
from hlwq_jax.planes import pack_planes, plane_widths, planes_from_stream, unpack_indices, unpack_planes
from hlwq_jax.quantize import BEST_RECIPE, PUBLISHED_RECIPE, Quantized, Recipe, dequantize, quantize, random_signs
from hlwq_jax.reader import Package, find_sidecar, find_tensors, open_folder, read_package
from hlwq_jax.slices import dequantize_in_slices
from hlwq_jax.stored import StoredWeight
from hlwq_jax.tensors import FormatError, LazyTensor, TensorFile, TensorInfo
from hlwq_jax.trellis import trellis_encode, trellis_indices, trellis_table

__all__ = [
    "BEST_RECIPE",
    "FORMS",
    "PUBLISHED_RECIPE",
    "TABLES",
    "Form",
    "FormatError",
    "FusedCheck",
    "LazyTensor",
    "Package",
    "Packed",
    "Packing",
    "Quantized",
    "QuantizedLinear",
    "Recipe",
    "ResolvedStems",
    "StoredWeight",
    "TableName",
    "TensorFile",
    "TensorInfo",
    "check_fused",
    "choose_form",
    "dequantize",
    "dequantize_in_slices",
    "dequantize_planes",
    "find_sidecar",
    "find_tensors",
    "fused_supports",
    "fused_weight",
    "hadamard_matrix",
    "hadamard_transform",
    "lloyd_max",
    "mangle",
    "open_folder",
    "pack",
    "pack_planes",
    "packed_length",
    "plane_widths",
    "planes_from_stream",
    "quantize",
    "quantize_linears",
    "quantized_matmul",
    "random_signs",
    "read_package",
    "replace_linears",
    "resolve_stems",
    "set_form",
    "trellis_encode",
    "trellis_indices",
    "trellis_table",
    "unpack",
    "unpack_indices",
    "unpack_planes",
]
