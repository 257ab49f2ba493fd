"""minimind_sft: supervised fine-tuning that does not make a small language model forget."""

__version__ = "0.1.0"
