"""No address that leads into a private network passes, however it is written."""

import ipaddress

import pytest

from pipeline.fetch.hosts import Hosts, is_public
from schemas.errors import ConfigError, RowError


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",  # carriers' own
        "100.100.100.200",  # a cloud's metadata
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",  # most clouds' metadata
        "172.16.0.1",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:db8::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_of_the_public_internet_are_known(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_addresses_are_not_refused(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("rule", "host", "port", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1", 80, True),
        ("127.0.0.1", "localhost", 80, True),
        ("127.0.0.1", "127.0.0.2", 80, False),
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("127.0.0.1:8080", "127.0.0.1", 80, False),
        ("127.0.0.0/8", "127.9.9.9", 80, True),
        ("127.0.0.0/8", "10.0.0.1", 80, False),
        ("LocalHost", "localhost", 80, True),
        ("localhost:81", "localhost", 80, False),
        ("localhost", "127.0.0.1", 80, False),
        ("::1", "::1", 80, True),
        ("[::1]:80", "::1", 80, True),
        ("[::1]:80", "::1", 81, False),
        ("fd00::/8", "fd00::1", 80, True),
    ],
)
def test_what_is_allowed_is_no_more_than_what_was_said(rule, host, port, allowed):
    if allowed:
        assert Hosts([rule]).resolve(host, port)
    else:
        with pytest.raises(RowError, match="host_refused"):
            Hosts([rule]).resolve(host, port)


@pytest.mark.parametrize(
    "rule", ["", "*", "http://host", "a/b", "10.0.0.0/99", "host:99999", "a b"]
)
def test_a_rule_that_is_none_is_told_before_the_run(rule):
    with pytest.raises(ConfigError, match="--allow-host"):
        Hosts([rule])
