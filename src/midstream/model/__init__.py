"""The vision-language model: encoder, projector, decoder."""
