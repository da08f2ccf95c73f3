"""Configuration: what can be set, read from presets, YAML files and flags."""
