"""The model that ships with the worker: 2.25 MB, two million parameters, English small talk.

Only its path and name are here. How it was made is told in README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path

NAME = "satherd-demo"
PATH = Path(__file__).with_name("tiny-chat-q8_0.gguf")
