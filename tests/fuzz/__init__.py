"""The fuzz harness: cases that follow from (kind, seed, number) alone, run by worker processes. See docs/reliability.md.

Not named test_*: `make fuzz N=100000` runs it, tests/fuzz/test_fuzz.py a minute of it.
"""
