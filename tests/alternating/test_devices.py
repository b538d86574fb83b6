"""On meshes and in mapped regions the numbers are those of one device."""

import eight_devices
import pytest
from alternating import devices

# tests/devices has cases of this subpackage for the normal suite.
pytestmark = [pytest.mark.deep, pytest.mark.xdist_group("alternating_devices")]


@pytest.mark.parametrize("case", devices.CASES)
def test_devices(case):
    eight_devices.check("alternating.devices", case)
