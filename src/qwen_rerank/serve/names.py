"""Which names a request may give as `model`."""

from __future__ import annotations

from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.settings import ServeSettings

_UNNAMED = ("", "default", "default/not-specified")  # what clients send that have no name to send


class ModelNames:
    """The names of the one model that is served.

    Args:
        own: The scorer's name; its last part is a name too. A folder goes by its last part alone, so that no answer
            tells where things lie on this machine.
        settings: Further names, and whether any name will do.
    """

    def __init__(self, own: str, settings: ServeSettings) -> None:
        short = own.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        names = [short] if own.startswith(("/", ".", "~")) or "\\" in own else [own, short]
        self.all = list(dict.fromkeys([*settings.served_names, *names]))
        self._known = {name.lower() for name in (*self.all, *_UNNAMED)}
        self._any = settings.any_model

    @property
    def reported(self) -> str:
        """The name that answers carry."""
        return self.all[0]

    def check(self, given: str | None) -> None:
        """Refuse a name that is not served.

        Raises:
            ApiError: 404.
        """
        if given is None or self._any or given.strip().lower() in self._known:
            return
        served = ", ".join(repr(name) for name in self.all)
        message = f"this model is not served here; the server has {served}, and `model` may be left out."
        raise ApiError(404, "model_not_found", message, param="model")
