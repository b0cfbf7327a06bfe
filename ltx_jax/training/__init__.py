"""Training of all models of LTX-2.3: full, or low-rank adapters beside frozen (packed) weights."""
