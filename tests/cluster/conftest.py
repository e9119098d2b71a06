"""A Slurm, or two hosts, for the tests of a module."""

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.slurm import Slurm
from tests.packages import needed

SSH_PORT = 2222


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    needed("slurmctld", "slurmd", "slurm-client", "munge")
    cluster = Slurm(logs=tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    needed("openssh-server", "openssh-client", "iproute2")
    pair = Hosts(tmp_path_factory.mktemp("hosts"), ssh_port=SSH_PORT)
    yield pair
    pair.stop()


@pytest.fixture(autouse=True)
def nodes_back(request):
    """A node that a test took away is there for the next one."""
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").restore_nodes()
