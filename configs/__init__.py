"""Whole pipelines, one YAML each; `configs/deepspeed/` holds engine settings."""
