"""Decoders as plain pytrees with functional apply."""
