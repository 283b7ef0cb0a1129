"""The TOFU tables: reference models, splits and studies."""
