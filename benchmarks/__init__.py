"""Benchmarks: baselines written from the method's definition, inputs like a real model's, and gated measurements."""
