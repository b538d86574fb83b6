"""On meshes and in mapped regions the numbers are those of one device."""

import eight_devices
import pytest
from alternating import devices


@pytest.mark.parametrize("case", devices.CASES)
def test_devices(case):
    eight_devices.check("alternating.devices", case)
