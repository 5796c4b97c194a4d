"""What the Llama family is: shapes, limits, licences and claims of every member. Plain data, no torch."""

from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling

__all__ = ["AttentionTemperature", "ModelConfig", "RopeScaling"]
