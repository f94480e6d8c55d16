"""Graph neural networks trained layer by layer."""

__all__: list[str] = []
