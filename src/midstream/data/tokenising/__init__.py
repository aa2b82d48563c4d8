"""Tokenising by tiktoken's core where its ids are those of `tokenizers`."""
