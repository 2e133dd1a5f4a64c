"""The teacher's key: one function for each exercise, from which stubs and solution notebooks are built."""
