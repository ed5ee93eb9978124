"""Names, ports, and the way of this machine to others."""

from __future__ import annotations

import socket

import pytest

from fp8lm.runtime.addresses import (
    address_of,
    interface_of,
    is_loopback,
    leads_to_loopback,
    network_id,
    port_problem,
    route_address,
    wait_for_name,
)
from fp8lm.runtime.errors import InputError


def test_the_way_to_this_machine():
    assert route_address("127.0.0.1") == "127.0.0.1"
    assert address_of(interface_of("127.0.0.1")) == "127.0.0.1"
    assert route_address("nohost.invalid") is None and route_address("n" * 64) is None
    assert interface_of("192.0.2.77") is None and address_of("no0") is None
    assert network_id() == network_id()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.1.1", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("a", False),
    ],
)
def test_loopback(address, expected):
    assert is_loopback(address) == expected


def test_names_that_lead_to_loopback():
    assert leads_to_loopback("localhost") and leads_to_loopback("nohost.invalid")
    assert not leads_to_loopback("10.0.0.1")


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert port_problem(server.getsockname()[1]) == "Address already in use"
    assert port_problem(0) is None


def test_a_name_without_an_address():
    with pytest.raises(InputError, match="MASTER_ADDR=x: "):
        wait_for_name("nohost.invalid", "MASTER_ADDR=x", patience=0.0)
