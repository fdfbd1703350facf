"""Many runs: grids, the processes that run them, their tables and the report."""
