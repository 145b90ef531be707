"""The fuzz harness: cases that follow from (kind, seed, number) alone, run by worker processes.

`make fuzz N=100000` runs it, test_fuzz.py a minute of it; docs/reliability.md tells what it promises.
"""
