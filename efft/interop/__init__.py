"""Checkpoints and adapters of Hugging Face transformers, PEFT and AdapterHub, in and out."""
