"""Vision, video, protein and audio encoders with attention on coded keys and values."""

from spectralquant.integrations.adapters import ProjectionAdapter as ProjectionAdapter
from spectralquant.integrations.calls import AttentionAdapter as AttentionAdapter
from spectralquant.integrations.calls import AttentionCall as AttentionCall
from spectralquant.integrations.encoder import EncoderEngine as EncoderEngine
