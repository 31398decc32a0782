"""What all tests share."""

import tempfile

import pytest


@pytest.fixture(autouse=True, scope="session")
def _locks_of_its_own(tmp_path_factory):
    """Give this run of the tests its own folder for locks; its child processes inherit it."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield
