"""LTX-2.3 as a JAX library."""
