"""The sizes of the paper, by name."""

from midstream.config.model import DecoderConfig

# OpenLM's open_lm/model_configs: open_lm_11m_v2, 79m_v2, 154m_v2, 411m_v2, 1b (the paper's 1.4B)
# and 7b. All with qk-norm, as in DCLM.
DECODERS = {
    "11m": DecoderConfig(hidden_size=96, num_layers=8, num_heads=4),
    "79m": DecoderConfig(hidden_size=512, num_layers=8, num_heads=4),
    "154m": DecoderConfig(hidden_size=576, num_layers=24, num_heads=8),
    "411m": DecoderConfig(hidden_size=1024, num_layers=24, num_heads=8),
    "1b": DecoderConfig(hidden_size=2048, num_layers=24, num_heads=16),
    "7b": DecoderConfig(hidden_size=4096, num_layers=32, num_heads=32),
}
