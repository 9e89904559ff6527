"""The public names and signatures: a change of them is seen in a review."""

from __future__ import annotations

import pytest

from tests.public_api import FILE, public_api


@pytest.mark.heavy
def test_the_public_names_are_those_that_are_written_down():
    assert public_api() == FILE.read_text(encoding="utf-8"), "wanted? then run: python -m tests.public_api"
