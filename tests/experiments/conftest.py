"""What recipes may bind, registered once; every test begins without bindings."""

import gin
import pytest

from experiments import bindings, launch


@pytest.fixture(scope="session")
def registered():
    bindings.register()
    gin.add_config_file_search_path(str(launch.ROOT))


@pytest.fixture(autouse=True)
def cleared(registered):
    gin.clear_config(clear_constants=True)
    yield
    gin.clear_config(clear_constants=True)
