"""What is handed on: model folder, model card, GGUF file."""
