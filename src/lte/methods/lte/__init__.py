"""LTE: its config and its training: losses, controller, start of routers and compensation, calibration."""

from lte.methods.lte.config import LTEConfig

__all__ = ["LTEConfig"]
