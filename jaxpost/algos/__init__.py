"""Algorithms: a batch source and a pure loss each. Importing this package registers the built-in ones."""

from jaxpost.algos import sft  # noqa: F401
