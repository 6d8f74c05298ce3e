"""The bundled demo model: a 5-million-parameter storyteller, what the engine runs when no model is named.

It is an ordinary Hugging Face checkpoint of the Qwen3 architecture, so nothing in the engine knows about it.
README.md beside this file says how it was made; ``train.py`` made it.
"""

from pathlib import Path

DEMO_DIR = Path(__file__).parent
"""The checkpoint directory, to be given to the engine like any other local model."""
