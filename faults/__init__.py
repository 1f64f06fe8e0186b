"""Faults, injected from outside, that philens must survive: `python -m faults` or `make faults`.

To survive a fault is to give the right result, or one sentence and exit code 2: never a traceback,
never lost data, never silently different numbers.
"""
