"""The public path of what a blank may hold: see `anyorder.decoding.constraints`."""

from anyorder.decoding.constraints import Choice, Constraint, JsonSchema, Pattern

__all__ = ["Choice", "Constraint", "JsonSchema", "Pattern"]
