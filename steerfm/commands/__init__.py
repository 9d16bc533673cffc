"""The commands, one a file: each has `run(arguments) -> int`, callable in process."""
