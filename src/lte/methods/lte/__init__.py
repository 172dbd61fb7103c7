"""LTE: its conversion, and its training: losses, controller, starts of routers and compensation, calibration."""

from lte.methods.lte.config import LTEConfig

__all__ = ["LTEConfig"]
