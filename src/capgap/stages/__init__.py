"""Single stages of the pipeline, each a function that a command calls."""
