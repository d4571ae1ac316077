"""Speed and memory against other libraries: `python -m tests.bench [NAME ...] [--json FILE] [--quick]`."""
