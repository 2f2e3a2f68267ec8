"""Properties of drawn cases: a few, the same every time, in the ordinary suite; thousands of new ones with -m slow."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def fuzz(few: int, many: int) -> Callable:
    """Makes ``check(data)``, which draws what it needs, a test of so many cases."""

    def decorate(check: Callable[[st.DataObject], Any]) -> Callable:
        @pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(cases):
            profile = settings(max_examples=cases, derandomize=cases == few, print_blob=True)
            profile(given(data=st.data())(check))()

        test.__doc__ = check.__doc__
        return test

    return decorate


def refused(call: Callable[[], Any], *words: str, allowed: tuple[type[Exception], ...] = ()) -> bool:
    """Whether a call is refused as it should be: with a ValueError whose message holds one of the words.

    Any other exception goes through, but ``allowed`` ones, which need a message as well.
    """
    try:
        call()
    except (ValueError, *allowed) as error:
        assert any(word in str(error) for word in words), f"{error!r} names none of {words}"
        return True
    return False
