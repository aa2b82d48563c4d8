"""The model FLOPs of training: what a utilisation counts, in profiles, results and plans alike."""

from midstream.config.connectors import connector_flops, gated_flops, untaken_flops
from midstream.config.model import (
    VLMConfig,
    attention_flops,
    encoder_flops,
    head_flops,
    patch_flops,
    weight_flops,
)

Number = float | int


def looking_flops(model: VLMConfig, positions: Number, images: Number) -> Number:
    """Forward FLOPs of gated blocks, if the model has some; all positions are taken to look at a
    picture."""
    gated, encoder, decoder = model.projector.gated, model.encoder, model.decoder
    if gated is None or encoder is None:
        return 0.0
    seen = model.projector.widths(encoder.hidden_size, decoder.hidden_size)[-1]
    kept = model.projector.num_features(encoder.num_patches)
    sizes = (decoder.num_layers, decoder.hidden_size, seen, kept)
    of_position, of_image = gated_flops(gated, *sizes)
    return positions * of_position + images * of_image


def connecting_flops(model: VLMConfig, images: Number) -> tuple[Number, Number]:
    """Forward FLOPs of so many pictures' features through the connector, and what the backward pass
    leaves out where nothing is trained before it."""
    if model.encoder is None:
        return 0.0, 0.0
    sizes = (model.encoder.num_patches, model.encoder.hidden_size, model.decoder.hidden_size)
    return (
        images * connector_flops(model.projector, *sizes),
        images * untaken_flops(model.projector, *sizes),
    )


def model_flops(
    model: VLMConfig,
    *,
    positions: Number,
    texts: Number,
    attended: Number,
    images: Number,
    encoded: Number,
    trains_encoder: bool,
    trains_decoder: bool = True,
) -> Number:
    """What training on these positions needs, however it is computed: over a device's peak and the
    time taken, the utilisation.

    positions: those that are no padding; texts: those of them that are no picture's, each with
    logits, learnt or not; attended: the sum over positions of how many each looks at (a causal mask
    counts once, and ends at a document's border); images: pictures; encoded: those that the encoder
    looked at, 0 where their features are stored, each at the length of its patches. Training is one
    forward pass, one backward to what goes in and one to the weights, without those of what is
    frozen. The input embedding, norms, the optimiser and what is computed twice count nothing.
    """
    decoder, encoder = model.decoder, model.encoder
    forward = weight_flops(decoder) * positions + head_flops(decoder) * texts
    total = 3 * (forward + attention_flops(decoder) * attended)
    if not trains_decoder:
        # The gradients of its weights; attention has none, and its backward pass stays.
        total -= forward
    if encoder is None:
        return total
    connector, untaken = connecting_flops(model, images)
    total += 3 * (connector + looking_flops(model, positions, images))
    if trains_encoder:
        # Nothing stands before the pixels.
        return total + encoded * (3 * encoder_flops(encoder) - patch_flops(encoder))
    return total + encoded * encoder_flops(encoder) - untaken
