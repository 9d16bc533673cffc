"""Damaged and hostile input: either the right result, or one of our errors in one line; never anything run.

`make fuzz` draws 10,000 inputs a test instead of 100 (STEERFM_FUZZ=10000), anew each time.
"""
