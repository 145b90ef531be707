"""Inputs, gates, timing and bookkeeping of every measurement."""
