"""puna: the home of the Llama family. The front door is loaded on first use, so that rooms can be used alone."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna.engine import Inputs, Model, Reply, load

__version__ = "0.1.0"
__all__ = ["Inputs", "Model", "Reply", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import puna.engine

        return getattr(puna.engine, name)
    raise AttributeError(f"module 'puna' has no attribute {name!r}")
