"""Sentences, charts, tables and the page of a law and of the records behind it."""
