"""Commands that refuse their options: what they say, which is argparse's way."""

from collections.abc import Callable

import pytest


def refusal(
    main: Callable[[list[str]], object], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """What ``main`` says of the flags that it refuses, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def as_typed(value: object) -> str:
    """The name of a test by its flags alone, for ``ids`` of :func:`pytest.mark.parametrize`."""
    return " ".join(value) if isinstance(value, list) else ""
