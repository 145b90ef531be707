"""Tuning, profiling, and machine code read without a GPU."""
