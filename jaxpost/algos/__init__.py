"""Algorithms: a batch source and a pure loss each. Importing this package registers the built-in ones."""

from jaxpost.algos import cpo, dpo, orpo, sft, simpo  # noqa: F401
