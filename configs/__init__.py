"""Whole pipelines, one YAML each; `chainrule run quickstart` finds them by name."""
