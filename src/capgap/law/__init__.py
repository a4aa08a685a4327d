"""From records to optima, laws, warnings and a verdict. Nothing here imports torch."""
