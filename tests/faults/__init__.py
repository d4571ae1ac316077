"""What can happen to a run, done to it: `python -m tests.faults`, or quickly in tests/test_faults.py."""
