"""Midstream: when, and how, should a language model first see images?

The words and the layout are described in `docs/`; every option stands in `midstream.config`.
"""

__version__ = "0.1.0"
