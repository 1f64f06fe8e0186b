"""Measurements that anyone can repeat: `python -m benchmarks --help`, and each module that is a command."""
