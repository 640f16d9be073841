"""Evaluation inside and outside of training."""
