"""A LangChain callback handler that writes down which runs there were, for tests."""

from __future__ import annotations

from langchain_core.callbacks import BaseCallbackHandler


class Runs(BaseCallbackHandler):
    """Remembers every run by name and parent, and every error that ended one."""

    def __init__(self) -> None:
        self.started = {}
        self.ended = []
        self.errors = []

    def on_chain_start(self, serialized, inputs, *, run_id, parent_run_id=None, name=None, **kwargs):
        self.started[run_id] = (name, parent_run_id)

    on_retriever_start = on_chain_start

    def on_chain_end(self, outputs, *, run_id, **kwargs):
        self.ended.append(self.started[run_id][0])

    on_retriever_end = on_chain_end

    def on_chain_error(self, error, **kwargs):
        self.errors.append(error)

    def tree(self, parent=None) -> dict:
        """Return the runs as nested names."""
        return {name: self.tree(run) for run, (name, above) in self.started.items() if above == parent}
