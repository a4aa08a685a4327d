"""From a language model to one that answers: conversations, templates, TRL underneath."""
