"""All stages of a run, one after the other: what each needs, and which have to run."""
