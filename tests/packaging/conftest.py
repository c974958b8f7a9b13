"""One wheel and one environment for all the tests of it."""

import pytest
from installed_wheel import build_wheel, empty_environment


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this source."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def python(tmp_path_factory, wheel):
    """The Python of an environment with the wheel, torch and NumPy, and nothing of the extra [train]."""
    return empty_environment(tmp_path_factory.mktemp("environment") / "venv", wheel)
