"""One small file a method, each a frozen dataclass behind the interface of ``lte.surgery.method``."""
