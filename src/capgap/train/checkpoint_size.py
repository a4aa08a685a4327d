"""How large a file of a checkpoint is. Imports no torch."""

# About: a file is twice in memory while it is written
FILE_BYTES = 2**30
